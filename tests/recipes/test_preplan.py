"""The preplan-and-anchor rule beside its formulas, token by token, from eager attention maps."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny_models import tiny
from transformers import set_seed

import tokenweights as tw
from tokenweights import HeadClasses, Recipe, RolloutBatch, TokenWeightsError
from tokenweights.recipes import preplan, signals
from tokenweights.recipes.backward import joined_readings, middle_third

SETS = ("preplan_anchor40", "preplan40", "future_anchor40", "preplan_anchor40_coupled")
CONTROLS = ("random_credit40", "entropy_credit40")
LAYERS, HEADS = (1, 2), {1: HeadClasses((0,), (3,)), 2: HeadClasses((2,), (1,))}
PROMPT, WIDTH = 5, 70


# The formulas, read anew.


def distances(rows, bound=10):
    """Windowed average distance of each row of a map."""
    return np.array(
        [sum(a * min(t - s, bound) for s, a in enumerate(row[: t + 1])) for t, row in rows]
    )


def influences(attention, tokens, first=10, last=50):
    """Mean over later rows at these distances of what they give to a token."""
    found = []
    for s in tokens:
        later = [t for t in range(s + first, min(len(attention) - 1, s + last) + 1)]
        found.append(float(np.mean([attention[t][s] for t in later])) if later else 0.0)
    return np.array(found)


def top(values, share="0.4"):
    """The highest ceil(share n) of a response; of equal ones the later."""
    count = math.ceil(Fraction(share) * len(values))
    order = sorted(range(len(values)), key=lambda place: (values[place], place))
    chosen = np.zeros(len(values), bool)
    chosen[order[len(values) - count :]] = True
    return chosen


def weights_of_response(far, influence, chosen):
    """The rule on one response of advantage above 0."""
    change = np.append(np.abs(np.diff(far)), 0.0)
    plan, anchor = top(change), top(influence)
    if chosen != "coupled":
        return np.where({"both": plan | anchor, "preplan": plan, "anchors": anchor}[chosen], 1.5, 1)
    near = np.zeros(len(far), bool)
    near[np.argsort(far, kind="stable")[: math.ceil(len(far) / 2)]] = True
    credit = anchor.astype(float)
    for s in np.flatnonzero(anchor & near):
        before = [t for t in (s - 1, s - 2, s - 3) if t >= 0 and plan[t]]
        if before:
            peak = max(before, key=lambda t: change[t])
            credit[s] -= 0.5
            credit[peak] += 0.5
    return 1 + 0.5 * np.minimum(credit, 1)


CHOSEN = dict(zip(SETS, ("both", "preplan", "anchors", "coupled"), strict=True))


def eager(attn="eager"):
    set_seed(3)
    return tiny("qwen3", attn)


def batch_of(made, lengths=(70, 41, 12, 1)):
    """A batch of responses to left-padded prompts, with what a recipe reads of a model."""
    model = eager("sdpa")
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 30, (len(lengths), PROMPT + WIDTH), generator=generator)
    real = torch.ones(ids.shape, dtype=torch.bool)
    for row, length in enumerate(lengths):
        real[row, : row % PROMPT] = False
        real[row, PROMPT + length :] = False
    reading = made.attention
    positions = (real.long().cumsum(-1) - 1).clamp_min(0)
    with (
        torch.no_grad(),
        tw.capture_attention(
            model,
            reading.layers,
            rows=WIDTH + 1,
            reduce=lambda call: reading.readings(call, key_mask=real),
        ) as capture,
    ):
        model(ids, attention_mask=real.long(), position_ids=positions, use_cache=False)
        maps = eager()(
            ids,
            attention_mask=real.long(),
            position_ids=positions,
            use_cache=False,
            output_attentions=True,
        ).attentions
    columns = joined_readings(capture.calls)
    batch = RolloutBatch(
        mask=real[:, PROMPT:],
        advantages=torch.tensor([1.0, 0.5, 2.0, -1.0])[: len(lengths), None],
        attention={
            name: reading.aligned(values, response_length=WIDTH) for name, values in columns.items()
        },
    )
    return batch, maps, real


@pytest.mark.parametrize("named_heads", [False, True])
@pytest.mark.parametrize("name", SETS)
def test_weights_are_those_of_eager_maps(name, named_heads):
    made = tw.recipe(name)
    if named_heads:
        made = tw.with_head_classes(made, HEADS)
    else:
        made = made.on_model(eager())
    layers = made.layers
    batch, maps, real = batch_of(made)
    rollout = made.weighted(batch, step=0)
    for row in range(len(real)):
        own = real[row].nonzero().flatten()
        means = []
        for kind in ("local", "distant"):
            heads = {n: list(getattr(HEADS[n], kind)) for n in layers} if named_heads else {}
            means.append(
                torch.stack(
                    [maps[n][row][heads.get(n, slice(None))].double().mean(0) for n in layers]
                )
                .mean(0)[own][:, own]
                .numpy()
            )
        tokens = [place for place, column in enumerate(own.tolist()) if column >= PROMPT]
        far = distances([(t, means[0][t]) for t in tokens])
        influence = influences(means[1], tokens)
        if float(batch.advantages[row]) < 0:
            expected = np.ones(len(tokens))
        else:
            expected = weights_of_response(far, influence, CHOSEN[name])
        rule = made.rule.positive
        found = rule.distance(batch)[row][batch.mask[row]].numpy()
        np.testing.assert_allclose(found, far, atol=1e-5)
        found = rule.influence(batch)[row][batch.mask[row]].numpy()
        np.testing.assert_allclose(found, influence, atol=1e-5)
        found = rollout.weights[row][batch.mask[row]].numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)


def given(far, influence, **fields):
    """The rule on numbers at hand, one response."""
    read = {"0_distance_10": torch.tensor([far]), "0_received_10_50": torch.tensor([influence])}
    batch = RolloutBatch(
        mask=torch.ones(1, len(far), dtype=torch.bool),
        advantages=torch.ones(1, 1),
        attention=read,
    )
    rule = preplan.PreplanAnchor(
        distance=signals.BackwardDistance(layers=(0,)),
        influence=signals.FutureInfluence(layers=(0,)),
        **fields,
    )
    return Recipe(rule=rule).weighted(batch, step=0).weights[0].tolist()


def test_worked_by_hand():
    far, influence = [1.0, 9.0, 2.0, 2.5, 6.0], [0.1, 0.2, 0.9, 0.3, 0.8]
    # Changes 8, 7, 0.5, 3.5, 0: tokens 0 and 1 plan. Anchors are 2 and 4.
    assert given(far, influence, chosen="preplan") == [1.5, 1.5, 1.0, 1.0, 1.0]
    assert given(far, influence, chosen="anchors") == [1.0, 1.0, 1.5, 1.0, 1.5]
    assert given(far, influence) == [1.5, 1.5, 1.5, 1.0, 1.5]
    # Anchor 2 is among the nearest three (0, 2, 3) and passes half to token 0, of the larger
    # change; anchor 4 looks back far.
    assert given(far, influence, chosen="coupled") == [1.25, 1.0, 1.25, 1.0, 1.5]
    assert given(far, influence, chosen="coupled", reach=1) == [1.0, 1.25, 1.25, 1.0, 1.5]
    assert given(far, influence, chosen="coupled", passed=0.0) == [1.0, 1.0, 1.5, 1.0, 1.5]


def test_controls_credit_as_many_tokens_of_the_same_responses():
    mask = torch.ones(3, 20, dtype=torch.bool)
    entropy = torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    batch = RolloutBatch(
        mask=mask, advantages=torch.tensor([[1.0], [0.0], [-1.0]]), predictive_entropy=entropy
    )
    for name in CONTROLS:
        weights = tw.recipe(name).weighted(batch, step=0).weights
        assert weights[1:].eq(1).all() and (weights[0] == 1.5).sum() == 8
    weights = tw.recipe("entropy_credit40").weighted(batch, step=0).weights
    assert torch.equal(weights[0] == 1.5, entropy[0] >= entropy[0].topk(8).values.min())


def test_heads_are_named_from_a_probe_batch_and_stay_in_the_text():
    model, ids = eager("sdpa"), torch.arange(30)[None]
    mask = ids >= 8
    real = torch.ones_like(mask)
    real[:, :3] = False
    classes = tw.probe_head_classes(model, ids, mask, attention_mask=real, layers=(0, 1))
    for layer, found in classes.items():
        positions = (real.long().cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            maps = eager()(
                ids, attention_mask=real.long(), position_ids=positions, output_attentions=True
            ).attentions[layer][0, :, 3:, 3:]
        distance = torch.arange(27)[:, None] - torch.arange(27)
        means = (maps * distance).sum(-1)[:, mask[0, 3:]].mean(-1)
        assert found == HeadClasses((int(means.argmin()),), (int(means.argmax()),))
    made = tw.with_head_classes(tw.recipe("preplan_anchor40"), classes)
    assert tw.recipe(made.to_dict()) == made
    assert made.layers == (0, 1)
    assert made.placed(4) == made


def test_five_layers_of_the_middle_third():
    assert middle_third(36, range(36)) == (12, 15, 18, 20, 23)
    assert middle_third(4, range(4)) == (2,)
    assert middle_third(1, range(1)) == (0,)
    assert middle_third(12, (1, 9)) == (9,)


def test_entropy_and_columns_are_read_together():
    entropy = signals.AttentionEntropy(layers=(1,), alignment="own")
    rule = preplan.PreplanAnchor(distance=signals.BackwardDistance(layers=(1,)), influence=entropy)
    made = Recipe(rule=rule)
    assert made.readings == ("1_distance_10", 1) and made.layers == (1,)
    batch, _, _ = batch_of(made)
    assert set(batch.attention) == {1, "1_distance_10"}
    assert made.entropy == entropy
    with pytest.raises(TokenWeightsError, match="one row"):
        Recipe(rule=preplan.PreplanAnchor(influence=signals.AttentionEntropy()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: signals.BackwardDistance(bound=0), "bound"),
        (lambda: signals.BackwardDistance(heads=((0,),)), "heads"),
        (lambda: signals.FutureInfluence(layers=(1, 2), heads=((0,),)), "heads"),
        (lambda: signals.FutureInfluence(layers=(1,), heads=((),)), "at least one head"),
        (lambda: signals.FutureInfluence(first=5, last=4), "last"),
        (lambda: signals.BackwardDistance(layers=()), "layers"),
        (lambda: preplan.PreplanAnchor(fraction=1.5), "fraction"),
        (lambda: preplan.PreplanAnchor(boost=0.5), "boost"),
        (lambda: preplan.PreplanAnchor(reach=0), "reach"),
        (lambda: tw.with_head_classes(tw.recipe("low2high"), HEADS), "names heads"),
        (lambda: tw.with_head_classes(tw.recipe("preplan40"), {}), "classes"),
        (lambda: tw.recipe("preplan40").placed(2, available=(0,)).placed(1, available=()), "layer"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(TokenWeightsError, match=message):
        make()
