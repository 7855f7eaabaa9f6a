"""Every named recipe, on one rollout batch in every layout: the same weights, metrics and gradient.

One process that holds the whole batch is the reference. `test_a_local_merge_is_noticed` replaces
each merge that spans ranks by what a rank knows alone and expects the comparison to fail.
"""

import functools
import itertools
import json
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from strategies import FLOATS, Layout, layouts, masks, poisoned, poisons, sample_ids, values
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import tokenweights as tw
from tokenweights import Recipe, RolloutBatch, TokenWeightsError
from tokenweights.distributed import _reduced, agreement
from tokenweights.recipes import combine, field, rules, signals
from tokenweights.recipes.parts import parts_of

STEP, DEPTH, WIDTH = 30, 36, 44
NAMES = tw.recipe_names()
NAMED = {name: tw.recipe(name).placed(DEPTH) for name in NAMES}
ENTROPY = signals.PredictiveEntropy()
# What the named recipes read of attention, the columns of one layer alike in all.
READ = tuple(dict.fromkeys(name for made in NAMED.values() for name in made.readings))
# What no name has: rules over all responses to a prompt, a draw of more than one token, and a gate
# that the whole opens and one of two ranks alone would not.
OTHERS = {
    "gate": Recipe(
        signal=ENTROPY,
        rule=combine.Gate(
            rule=rules.Top(scope="batch"), when=combine.BatchMean(signal=ENTROPY, above=0.234)
        ),
    ),
    "prompt top": Recipe(signal=ENTROPY, rule=rules.Top(fraction=0.3, scope="prompt")),
    "prompt quantile": Recipe(signal=ENTROPY, rule=field.AboveQuantile(scope="prompt")),
    "prompt range": Recipe(
        signal=ENTROPY, rule=field.Mapped(normalise="range", scope="prompt", low=0.1)
    ),
    "drop": Recipe(
        signal=signals.Covariance(), rule=field.RandomDrop(low=-9.0, high=9.0, fraction=0.05)
    ),
}
RECIPES = NAMED | OTHERS
# Weights that are an elementary function of a score, which may differ in their last bit.
SMOOTH = (rules.EndpointWeights, field.Mapped, field.Bonus, field.Damped)


def is_smooth(made):
    return any(
        isinstance(part, SMOOTH) or getattr(part, "weight", "one") == "score"
        for part in parts_of(made.rule)
    )


# Rules that look at one response or one token, and so never at another rank.
ALONE = {
    "full", "random20", "bernoulli20", "anchor20", "explorer20", "anchor20_all_tokens",
    "explorer20_all_tokens", "front20", "back20", "predictive_low20", "predictive_high20",
    "loss_low20", "loss_high20", "type_matched20", "position_matched20", "probability_weighted",
    "entropy_bonus", "position_bonus", "relative_surprisal_band", "sampler_ratio_truncated",
    "sampler_ratio_band", "positive_high_entropy50", "positive_low_entropy50",
    "negative_high_entropy50", "negative_low_entropy50", "preplan_anchor40", "preplan40",
    "future_anchor40", "preplan_anchor40_coupled", "random_credit40", "entropy_credit40",
}  # fmt: skip

# Valid tokens of each response, and the prompts, of unordered numbers, that they answer.
LENGTHS = [37, 0, 21, 8, 29, 14, 1, 33, 18, 11, 25]
PROMPTS = [5, 5, 5, 5, -2, -2, -2, 9, 9, -7, 40]
NUMBERS = [11, -3, 2**40, 7, 0, 901, 900, -(2**50), 12, 13, 5]
ADVANTAGES = [1.5, -1.0, -1.5, 0.5, 2.0, 0.0, -0.25, -2.0, 1.0, -0.5, 1.25]


@functools.cache
def drawn(kind: str) -> RolloutBatch:
    """The batch: with a low entropy, or with a high one and an advantage for each token."""
    generator = torch.Generator().manual_seed(0 if kind == "open" else 1)
    shape = (len(LENGTHS), WIDTH)

    def uniform(low: float, high: float, steps: int) -> Tensor:
        """Numbers on a grid, so that some of them tie."""
        grid = torch.randint(0, steps, shape, generator=generator) / steps
        return low + (high - low) * grid

    mask = torch.zeros(shape, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        mask[row, torch.randperm(WIDTH, generator=generator)[:length]] = True
    log_probs = -3 * uniform(0, 1, 128).square()
    rare = uniform(0, 1, 10) == 0
    log_probs = torch.where(rare, uniform(-10.0, -6.5, 32), log_probs)
    advantages = torch.tensor(ADVANTAGES)[:, None]
    if kind != "open":
        advantages = (uniform(-2.0, 2.5, 9) * 2).round() / 2
    apart = 0.4 * torch.randn(shape, generator=generator)
    apart[0] *= 4  # one response has the largest of all
    reach = torch.full((shape[0], 1), 0.75)
    reach[0] = 1.0
    return RolloutBatch(
        mask=mask,
        sample_ids=torch.tensor(NUMBERS),
        prompt_ids=torch.tensor(PROMPTS),
        token_ids=torch.randint(0, 6, shape, generator=generator),
        advantages=advantages,
        rewards=torch.rand(shape[0], generator=generator),
        log_probs=log_probs,
        sampler_log_probs=log_probs + apart,
        reference_log_probs=log_probs - 0.1 * torch.rand(shape, generator=generator),
        predictive_entropy=uniform(0, 0.5 if kind == "open" else 3.0, 100),
        self_certainty=uniform(0, 8.0, 512),
        token_loss=torch.randn(shape, generator=generator),
        attention={name: reach * uniform(0, 1, 64) for name in READ},
    )


KINDS = ("open", "closed")


def test_the_batch_has_what_the_rules_act_on():
    for kind in KINDS:
        batch = drawn(kind)
        assert (batch.predictive_entropy[batch.mask].mean() < 0.3) == (kind == "open")
        covariance = signals.Covariance()(batch)[batch.mask]
        assert ((covariance > 1) & (covariance < 5)).sum() > 5
        advantages = batch.advantages.expand(batch.mask.shape)[batch.mask]
        assert {-1.0, 0.0, 1.0} == set(advantages.sign().tolist())
        scores = batch.predictive_entropy[batch.mask]
        assert len(scores.unique()) < len(scores)
    weights = {name: made.weighted(drawn("open"), step=STEP) for name, made in NAMED.items()}
    ones = drawn("open").mask.float()
    assert [n for n in NAMES if torch.equal(weights[n].weights, ones)] == ["full"]
    closed = NAMED["surprisal_boost10_damp10"].weighted(drawn("closed"), step=STEP)
    assert torch.equal(closed.weights, drawn("closed").mask.float())


@dataclass(frozen=True)
class Outcome:
    """What a recipe does to a step, or a rank's share of it; losses with their gradients."""

    weights: dict[int, Tensor]
    scale: float
    metrics: dict[str, float]
    loss: Tensor
    trained: Tensor


def policy_loss(batch: RolloutBatch, factors: Tensor, count: Tensor) -> Tensor:
    """The clipped loss of a policy of three parameters, and its gradient, after one update."""
    parameters = torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    columns = (batch.predictive_entropy, batch.self_certainty, batch.token_loss)
    features = torch.stack([torch.where(batch.mask, column, 0.0) for column in columns], -1)
    old = torch.where(batch.mask, batch.log_probs, 0.0).double()
    new = old + features.double() @ parameters
    advantages = torch.where(batch.mask, batch.advantages, 0.0).double() * factors.double()
    losses = tw.clipped_surrogate_loss(new, old, advantages, mask=batch.mask)
    loss = tw.weighted_token_mean(losses, batch.mask, count=count)
    (gradient,) = torch.autograd.grad(loss, parameters)
    return torch.cat([loss.detach()[None], gradient])


def outcome(made: Recipe, batch: RolloutBatch, group: dist.ProcessGroup | None = None) -> Outcome:
    rollout = made.weighted(batch, step=STEP, group=group)
    weights, scale = rollout.weights, rollout.scale
    own = tw.loss_denominator(batch.mask, weights, denominator=made.denominator, group=group)
    every = tw.loss_denominator(batch.mask, group=group)
    by_number = {
        int(number): row[valid]
        for number, row, valid in zip(batch.sample_ids, weights, batch.mask, strict=True)
    }
    loss, trained = (
        policy_loss(batch, factors, count)
        for factors, count in ((weights, own), (weights * scale, every))
    )
    return Outcome(by_number, float(scale), rollout.metrics, loss, trained)


@functools.cache
def expected(name: str, kind: str) -> Outcome:
    return outcome(RECIPES[name], drawn(kind))


def difference(name: str, kind: str, got: Outcome | None) -> str:
    """What is not as in one process; empty if all is."""
    want = expected(name, kind)
    if got is None:
        return "refused"
    if got.weights.keys() != want.weights.keys():
        return "responses"
    mine, theirs = (torch.cat([o.weights[n] for n in NUMBERS]) for o in (got, want))
    if is_smooth(RECIPES[name]):
        same = torch.allclose(mine, theirs, rtol=1e-6, atol=1e-6)
    else:
        same = torch.equal(mine, theirs)
    if not same:
        return "weights"
    if got.scale != pytest.approx(want.scale, rel=1e-6):
        return "scale"
    if got.metrics != pytest.approx(want.metrics, rel=1e-6, abs=1e-6):
        return "metrics"
    for field_name in ("loss", "trained"):
        if not torch.allclose(*(getattr(o, field_name) for o in (got, want)), rtol=1e-6, atol=1e-6):
            return field_name
    # A loss by the recipe's own count, and by all tokens with the scale on the weights, are one.
    return "" if torch.allclose(got.loss, got.trained, rtol=1e-6, atol=1e-6) else "paths"


def differences(kind: str, results: dict[str, Outcome | None]) -> dict[str, str]:
    found = {name: difference(name, kind, got) for name, got in results.items()}
    return {name: what for name, what in found.items() if what}


# Layouts in one process.


def filled(batch: RolloutBatch) -> dict[str, Tensor]:
    """The columns of a batch by name, those of attention by their own."""
    named = {name: getattr(batch, name) for name in batch.filled if name != "attention"}
    return named | {f"read {name}": column for name, column in (batch.attention or {}).items()}


def batch_of(columns: dict[str, Tensor]) -> RolloutBatch:
    read = {f"read {name}": name for name in READ}
    attention = {read[name]: column for name, column in columns.items() if name in read}
    named = {name: column for name, column in columns.items() if name not in read}
    return RolloutBatch(**named, attention=attention or None)


def padded(batch: RolloutBatch, layout: Layout, poison: str) -> RolloutBatch:
    """Other rows, more columns on both sides, and poison wherever no valid token is."""
    columns = {}
    for name, column in filled(batch).items():
        wide = column.dim() == 2 and column.shape[1] > 1
        if name not in ("mask", "sample_ids", "prompt_ids") and column.dim() == 2:
            column = poisoned(column, batch.mask if wide else batch.mask.any(-1)[:, None], poison)
        columns[name] = layout.moved(column, "batch token" if wide else "batch")
    return batch_of(columns)


def packed(batch: RolloutBatch, order: Tensor) -> RolloutBatch:
    """Responses without their holes, in one line in some order, and taken apart again."""
    columns, lengths = {}, batch.mask.sum(-1)[order]
    bounds = [0, *lengths.cumsum(0).tolist()]
    for name, column in filled(batch).items():
        columns[name] = column[order]
        if column.dim() == 2 and column.shape[1] > 1:
            line = torch.cat([column[row][batch.mask[row]] for row in order])
            parts = [line[a:b] for a, b in itertools.pairwise(bounds)]
            columns[name] = pad_sequence(parts, batch_first=True)
    return batch_of(columns)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3)
@given(layout=layouts(len(LENGTHS)), poison=poisons)
def test_padding_and_order_of_rows(kind, layout, poison):
    batch = padded(drawn(kind), layout, poison)
    assert not differences(kind, {name: outcome(made, batch) for name, made in RECIPES.items()})


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=2)
@given(order=st.permutations(range(len(LENGTHS))))
def test_packed_order(kind, order):
    batch = packed(drawn(kind), torch.tensor(order))
    assert not differences(kind, {name: outcome(made, batch) for name, made in RECIPES.items()})


@pytest.mark.parametrize("name", NAMES)
def test_every_split_into_micro_batches(name):
    batch, made, want = drawn("open"), RECIPES[name], expected(name, "open")
    weights = made.weighted(batch, step=STEP).weights
    count = tw.loss_denominator(batch.mask, weights, denominator=made.denominator)

    def loss_of(rows):
        return policy_loss(batch.rows(rows), weights[list(rows)], count)

    rows = range(len(LENGTHS))
    for size in rows[1:]:
        losses = sum(loss_of(rows[start : start + size]) for start in rows[::size])
        torch.testing.assert_close(losses, want.loss, rtol=1e-6, atol=1e-6)
    # Nor does it matter which rows a micro-batch holds, and in which order.
    apart = loss_of([8, 0, 3]), loss_of([2, 5, 10, 1, 4]), loss_of([9, 6, 7])
    torch.testing.assert_close(sum(apart), want.loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ALONE))
def test_a_response_alone_weighs_what_it_weighs_in_a_batch(name):
    for row in range(len(LENGTHS)):
        batch = drawn("open").rows([row])
        weights = NAMED[name].weighted(batch, step=STEP).weights[batch.mask]
        want = expected(name, "open").weights[NUMBERS[row]]
        torch.testing.assert_close(weights, want, rtol=0, atol=1e-6 * is_smooth(NAMED[name]))


# Ranks.

# Both ranks know as many prompts, and not the same, so that no shape gives a mistake away.
APART = [0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 1]
# Who holds each row: rows of one prompt lie apart, and one rank has nothing.
OWNERS = {
    1: {"alone": [0] * 11},
    2: {"uneven": [0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 0], "empty": [1] * 11, "apart": APART},
    4: {"uneven": [0, 1, 2, 1, 0, 2, 1, 1, 2, 1, 1], "empty": [3, 0, 3, 0, 3, 3, 0, 3, 3, 0, 3]},
}
LAYOUTS_OF_RANKS = [(size, case, "open") for size, cases in OWNERS.items() for case in cases]
LAYOUTS_OF_RANKS += [(2, "uneven", "closed"), (4, "uneven", "closed")]


@pytest.fixture(scope="module")
def pools():
    """One pool of ranks for each size, which start when first asked for."""
    with ExitStack() as stack:
        yield functools.cache(lambda size: stack.enter_context(Ranks(size)))


def outcomes_on(rank, size, kind, owners, names, mutation=None):
    """A rank's share of each recipe's outcome; None where the ranks refuse."""
    own = drawn(kind).rows([row for row, owner in enumerate(owners) if owner == rank])
    found = {}
    for name in names:
        with mock.patch(f"tokenweights.{mutation[0]}", mutation[1]) if mutation else nullcontext():
            try:
                found[name] = outcome(RECIPES[name], own, dist.group.WORLD)
            except TokenWeightsError:
                if not mutation:
                    raise
                found[name] = None
    return found


def merged(parts):
    """The outcome of the whole from those of ranks; None unless all say the same of it."""
    if any(part is None for part in parts):
        return None
    first = parts[0]
    for part in parts:
        if (part.scale, part.metrics) != (first.scale, first.metrics):
            return None
    return Outcome(
        {number: row for part in parts for number, row in part.weights.items()},
        first.scale,
        first.metrics,
        sum(part.loss for part in parts),
        sum(part.trained for part in parts),
    )


def ranks_differ(pool, kind, owners, names, mutation=None):
    parts = pool(outcomes_on, kind, owners, names, mutation)
    return differences(kind, {name: merged([part[name] for part in parts]) for name in names})


@pytest.mark.parametrize(("size", "case", "kind"), LAYOUTS_OF_RANKS)
def test_ranks(pools, size, case, kind):
    assert not ranks_differ(pools(size), kind, OWNERS[size][case], list(RECIPES))


def local_sum(values, *, group=None):
    return values.detach().clone()


def local_extrema(minimum, maximum, *, group=None):
    return minimum, maximum


def local_counts(counts, group):
    return counts


def local_reduction(values, operation, group):
    return values.detach().clone()


def local_maxima(values, operation, group):
    """Integers are summed over ranks, largest and smallest values are a rank's own."""
    if operation == dist.ReduceOp.SUM:
        return _reduced(values, operation, group)
    return values.detach().clone()


def local_numbers(values, positions, *, dim, group=None):
    """Prompts that other ranks have are not heard of."""
    return values


# A local "next order statistic" of a quantile is left out: a rank's own next score is never below
# its own scores above the cut, so no rule here can choose other tokens by it; `score_quantile` has
# a test of its own.
# What is merged, by which name, over which scope; a recipe that lives by it, and a batch for it.
MUTATIONS = {
    "batch, counts of a share": ("selection._summed", local_counts, "predictive_high20_batch"),
    "batch, counts by sign": ("selection._summed", local_counts, "surprisal_boost10"),
    "batch, counts of a quantile": (
        "selection._reduced", local_reduction, "predictive_above80_batch_all_tokens",
    ),
    "batch, masses of a budget": ("selection._summed", local_counts, "second_moment_drop"),
    "batch, unit of a budget": ("selection._reduced", local_maxima, "second_moment_drop"),
    "batch, counts of a random draw": ("selection._summed", local_counts, "covariance_drop"),
    "batch, tokens of a random draw": ("recipes.field.global_sum", local_sum, "drop"),
    "batch, moments": ("scaling.global_sum", local_sum, "entropy_proportional"),
    "batch, extrema of moments": ("scaling._least", local_counts, "entropy_proportional"),
    "batch, means of a covariance": ("likelihood.global_sum", local_sum, "covariance_drop"),
    "batch, largest change": (
        "recipes.field.global_extrema", local_extrema, "entropy_change_damped",
    ),
    "batch, mean of a gate": ("recipes.combine.global_sum", local_sum, "gate"),
    "batch, extrema of endpoints": ("weights.global_extrema", local_extrema, "low2high"),
    "batch, selected tokens": ("losses.global_sum", local_sum, "predictive_high20"),
    "prompt, numbers": ("scopes.gathered", local_numbers, "perplexity_shaping"),
    "prompt, numbers of a selection": ("scopes.gathered", local_numbers, "prompt top"),
    "prompt, counts of a share": ("selection._summed", local_counts, "prompt top"),
    "prompt, counts of a quantile": ("selection._reduced", local_reduction, "prompt quantile"),
    "prompt, moments": ("scaling.global_sum", local_sum, "certainty_shaping"),
    "prompt, extrema of moments": ("scaling._least", local_counts, "perplexity_shaping"),
    "prompt, extrema": ("scaling._least", local_counts, "prompt range"),
}  # fmt: skip


@pytest.mark.parametrize("merge", MUTATIONS)
def test_a_local_merge_is_noticed(pools, merge):
    *mutation, name = MUTATIONS[merge]
    assert ranks_differ(pools(2), "open", APART, [name], mutation)


COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "gather", "reduce", "broadcast")


def collectives_on(rank, size, kind, owners):
    """How many collectives each recipe's signal and rule enter, the ranks' agreement aside."""
    own = drawn(kind).rows([row for row, owner in enumerate(owners) if owner == rank])
    found = {}
    for name, made in RECIPES.items():
        with agreement("counted", dist.group.WORLD), ExitStack() as stack:
            watched = [
                stack.enter_context(mock.patch.object(dist, each, side_effect=getattr(dist, each)))
                for each in COLLECTIVES
            ]
            batch = RolloutBatch(**{n: getattr(own, n) for n in own.filled}, group=dist.group.WORLD)
            scores = None if made.signal is None else made.signal(batch)
            made.rule(scores, batch, step=STEP, group=dist.group.WORLD)
            found[name] = sum(each.call_count for each in watched)
    return found


def test_only_rules_that_span_responses_communicate(pools):
    for found in pools(2)(collectives_on, "open", OWNERS[2]["uneven"]):
        assert {name for name, count in found.items() if count == 0} == ALONE


# Properties of every recipe, on batches as they come on a bad day.


@st.composite
def rollouts(draw):
    mask = draw(masks(4, 9))
    rows = mask.any(-1)[:, None]
    dtype, poison = draw(st.sampled_from(FLOATS)), draw(poisons)

    def column(low: float, high: float) -> Tensor:
        unit = draw(values(mask.shape, dtype))
        return poisoned(low + (high - low) * unit, mask, poison)

    per_token = draw(st.booleans())
    shape = mask.shape if per_token else (len(mask), 1)
    size = torch.Size(shape).numel()
    signed = st.sampled_from([0.0, 1.0, -1.0, 0.25, -3.0, 1e-7, -1e4])
    drawn_advantages = draw(st.lists(signed, min_size=size, max_size=size))
    advantages = torch.tensor(drawn_advantages, dtype=torch.float64).to(dtype).view(*shape)
    log_probs = column(-12.0, 0.0)
    prompts = st.lists(st.integers(-2, 2), min_size=len(mask), max_size=len(mask))
    return RolloutBatch(
        mask=mask,
        sample_ids=draw(sample_ids(len(mask))),
        prompt_ids=torch.tensor(draw(prompts), dtype=torch.long),
        token_ids=torch.where(mask, (torch.arange(mask.numel()) % 3).view(mask.shape), -100),
        advantages=poisoned(advantages, mask if per_token else rows, poison),
        log_probs=log_probs.requires_grad_(),
        sampler_log_probs=column(-12.0, 0.0),
        predictive_entropy=column(0.0, draw(st.sampled_from([0.4, 3.0]))),
        self_certainty=column(0.0, 9.0),
        token_loss=column(-2.0, 2.0),
        attention={name: column(0.0, 1.0) for name in READ},
    )


@settings(max_examples=12)
@given(rollouts(), st.integers(0, 150))
def test_weights_are_weights(batch, step):
    for name, made in RECIPES.items():
        rollout = made.weighted(batch, step=step)
        weights = rollout.weights
        assert weights.dtype == torch.float32 and not weights.requires_grad, name
        assert weights.shape == batch.mask.shape, name
        assert bool(torch.isfinite(weights).all() and (weights >= 0).all()), name
        assert not weights[~batch.mask].any(), name
        assert torch.isfinite(rollout.scale) and rollout.scale >= 0, name


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_a_recipe_that_went_through_text_gives_the_same_weights(name):
    made, values = RECIPES[name], RECIPES[name].to_dict()
    read = [
        tw.recipe(values),
        tw.recipe(json.loads(json.dumps(values))),
        tw.recipe(yaml.safe_load(yaml.safe_dump(values))),
    ]
    want = made.weighted(drawn("open"), step=STEP)
    for other in read:
        assert other == made and other.describe() == made.describe()
        assert torch.equal(other.weighted(drawn("open"), step=STEP).weights, want.weights)
