"""VeRL's own workers and engines on real gloo ranks, against eager attention matrices."""

import itertools
import math
from functools import cache

import pytest
import tokenweights as tw
import torch
from batches import CASES, CLASSES, LAYERS, PREPLAN, ROWS, nested, plain_advantages, rows
from ranks import results_by_case
from tensordict import TensorDict
from tokenweights_lab import load_policy

from tokenweights_verl.scores import response_scores, rollout_batch

RUNS = {
    "one": (
        1,
        [
            *("fsdp", "fsdp2", "padded", "bucketed", "lora", "bfloat16", "flash"),
            *("fused", "fused_padded"),
        ],
    ),
    "two": (2, ["fsdp", "fsdp2", "lora"]),
    "slices": (2, ["ulysses"]),
}
# In bfloat16 the reference stays in float32, so that what is allowed is the rounding.
ROUNDED = {"entropy": 0.02, "log_probs": 0.5, "gradient": 0.05}
EXACT = {"entropy": 1e-5, "log_probs": 2e-5, "gradient": 2e-5}
EVERY_CASE = [(run, case) for run, (_, cases) in RUNS.items() for case in cases]


def allowed(case, what):
    return (ROUNDED if case == "bfloat16" else EXACT)[what]


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    return results_by_case("engine_run.py", RUNS, tmp_path_factory.mktemp)


@cache
def expected_rows():
    """Log-probabilities and normalized entropies of each row, from eager attention matrices."""
    model = load_policy(attn_implementation="eager")
    expected = []
    for prompt, response in rows():
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            output = model(ids, output_attentions=True)
        log_probs = output.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        entropies = []
        for layer in LAYERS:
            mean = output.attentions[layer][0].double().mean(0)
            entropy = -torch.special.xlogy(mean, mean).sum(-1)
            visible = torch.arange(1, len(entropy) + 1).double()
            entropies.append(entropy / visible.log().clamp(min=1e-300))
            entropies[-1][0] = 0.0
        expected.append((log_probs, entropies))
    return expected


def by_row(results, key, output):
    """What the ranks gave back, put together by the number of the row."""
    found = {}
    for result in results:
        if result[key] is not None:
            found |= dict(zip(result[key]["rows"], result[key][output], strict=True))
    assert sorted(found) == list(range(ROWS))
    return [found[row] for row in range(ROWS)]


@pytest.mark.parametrize(("run", "case"), EVERY_CASE)
def test_entropy_equals_that_of_eager_attention(results, run, case):
    for place, layer in enumerate(LAYERS):
        found = by_row(results(run, case), "probed", f"attention_entropy_{layer}")
        for row, (_, entropies) in zip(found, expected_rows(), strict=True):
            assert row.shape == entropies[place].shape
            atol = allowed(case, "entropy")
            torch.testing.assert_close(row.double(), entropies[place], atol=atol, rtol=0)


@cache
def expected_columns():
    """Backward distances and future influences of each row's tokens, from eager maps."""
    model, expected = load_policy(attn_implementation="eager"), []
    first, last, bound = (PREPLAN[name] for name in ("first", "last", "bound"))
    for prompt, response in rows():
        with torch.no_grad():
            maps = model(torch.tensor([prompt + response]), output_attentions=True).attentions
        count, columns = len(prompt) + len(response), {"local": [], "distant": []}
        for layer, classes in CLASSES.items():
            for kind, found in columns.items():
                found.append(maps[layer][0, getattr(classes, kind)].double().mean(0))
        local, distant = (torch.stack(found).mean(0) for found in columns.values())
        far = (torch.arange(count)[:, None] - torch.arange(count)).clamp(0, bound)
        later = [range(s + first, min(count - 1, s + last) + 1) for s in range(count)]
        influence = [
            sum(float(distant[t, s]) for t in own) / max(len(own), 1) for s, own in enumerate(later)
        ]
        expected.append(((local * far).sum(-1), torch.tensor(influence, dtype=torch.float64)))
    return expected


@pytest.mark.parametrize(("run", "case"), EVERY_CASE)
def test_columns_and_weights_are_those_of_eager_attention(results, run, case):
    made = tw.with_head_classes(tw.recipe(PREPLAN), CLASSES)
    names = [name for name in made.readings if "distance" in name]
    found = {
        name: by_row(results(run, case), "columns", f"attention_entropy_{name}")
        for name in made.readings
    }
    atol = allowed(case, "entropy") * (20 if case == "bfloat16" else 1)
    for row, (far, influence) in enumerate(expected_columns()):
        own = [found[name][row].double() for name in names]
        torch.testing.assert_close(torch.stack(own).mean(0), far, atol=atol, rtol=0)
        own = [found[name][row].double() for name in made.readings if name not in names]
        torch.testing.assert_close(torch.stack(own).mean(0), influence, atol=atol, rtol=0)
    if case == "bfloat16":
        return
    # Of ranks that hold slices of one row, the first gives it back.
    keys, data, order = rollout([one for one in results(run, case) if one["probed"]])
    for name, parts in found.items():
        data[f"attention_entropy_{name}"] = nested([parts[row] for row in order])
    weights = made.weighted(rollout_batch(made, 1, keys, data), step=0).weights
    credited = 0
    for place, row in enumerate(order):
        (prompt, response), advantage = rows()[row], float(plain_advantages()[row][0])
        far, influence = (values[len(prompt) :].tolist() for values in expected_columns()[row])
        wanted = [1.0] * len(response)
        if advantage > 0:
            change = [abs(a - b) for a, b in itertools.pairwise(far)] + [0.0]
            for values in (change, influence):
                ranked = sorted(range(len(values)), key=lambda t: (values[t], t))
                for token in ranked[len(ranked) - math.ceil(2 * len(ranked) / 5) :]:
                    wanted[token] = 1.5
        torch.testing.assert_close(weights[place, : len(wanted)], torch.tensor(wanted))
        credited += wanted.count(1.5)
    assert credited > 10


@pytest.mark.parametrize(("run", "case"), EVERY_CASE)
def test_the_tap_changes_nothing(results, run, case):
    ours, unprobed, plain = (
        by_row(results(run, case), key, "log_probs") for key in ("probed", "unprobed", "plain")
    )
    for row, (log_probs, _) in enumerate(expected_rows()):
        assert torch.equal(ours[row], plain[row]) and torch.equal(unprobed[row], plain[row])
        atol = allowed(case, "log_probs")
        torch.testing.assert_close(ours[row][:-1].float(), log_probs, atol=atol, rtol=0)
    keys = [set(result["unprobed"]) for result in results(run, case) if result["unprobed"]]
    assert not any(key.startswith("attention") for found in keys for key in found)


@pytest.mark.parametrize(("run", "case"), EVERY_CASE)
def test_uniform_weights_are_plain_verl(results, run, case):
    for result in results(run, case):
        assert result["engines"] == ("TokenWeightsFSDPEngine", "FSDPEngineWithLMHead")
        assert result["norm"] == result["plain_norm"]


@pytest.mark.parametrize(("run", "case"), EVERY_CASE)
def test_weights_stay_with_their_tokens(results, run, case):
    lengths = [len(response) for _, response in rows()]
    seen = [part for result in results(run, case) for part in result["seen"]]
    assert {row for row, _ in seen} == set(range(ROWS))
    for row, part in seen:
        named = (1.0 if row % 2 else -1.0) * (row + torch.arange(lengths[row]) / 100)
        assert torch.equal(part, named)
    if CASES[case].get("dynamic", True):
        orders = [[row for row, _ in result["seen"]] for result in results(run, case)]
        assert any(order != sorted(order) for order in orders), "nothing was re-ordered"


# With budgets and bounds that the few tokens of these rows meet.
SELECTED = {
    "predictive_high20_batch": {},
    "surprisal_boost10_damp10": {"below": 9.0},
    "covariance_drop": {"low": 0.1, "fraction": 0.1},
}


def rollout(results):
    """Columns from the ranks' outputs, rank after rank as they hold the rows, and the rows' order.

    There are two responses to each prompt.
    """
    order = [row for result in results for row in result["probed"]["rows"]]
    texts, advantages = rows(), plain_advantages()
    masks = [torch.ones(len(texts[row][1]), dtype=torch.long) for row in order]
    fields = {
        "response_mask": masks,
        "prompts": [torch.tensor(texts[row][0]) for row in order],
        "responses": [torch.tensor(texts[row][1]) for row in order],
        "advantages": [advantages[row] for row in order],
    }
    for output, field in (("log_probs", "old_log_probs"), ("entropy", "entropy")):
        whole = [part for result in results for part in result["probed"][output]]
        scores = response_scores(nested(whole), nested(masks), alignment="deciding")
        fields[field] = [part[: len(mask)] for part, mask in zip(scores, masks, strict=True)]
    data = {name: nested(parts) for name, parts in fields.items()}
    return [f"{row // 2}_{row}_0" for row in order], TensorDict(data, batch_size=ROWS), order


@pytest.mark.parametrize("name", SELECTED)
@pytest.mark.parametrize("case", ["fsdp", "fsdp2"])
def test_one_rank_and_two_select_the_same_tokens(results, case, name):
    """The weights are made of the whole batch, whichever rank computed a row's columns."""
    recipe, weights = tw.recipe({"name": name, **SELECTED[name]}), []
    for run in ("one", "two"):
        keys, data, order = rollout(results(run, case))
        found = recipe.weighted(rollout_batch(recipe, 1, keys, data), step=0).weights
        weights.append(found[torch.tensor(order).argsort()])
    assert torch.equal(*weights)
    lengths = [len(response) for _, response in rows()]
    valid = torch.arange(weights[0].shape[1]) < torch.tensor(lengths)[:, None]
    assert weights[0][valid].unique().numel() > 1


def gradient_norm(weighted):
    """Norm of the gradient of the clipped surrogate at ratio 1 against `old_log_probs` of -1."""
    model = load_policy(attn_implementation="eager")
    total, count = 0.0, sum(len(response) for _, response in rows())
    for (prompt, response), advantages in zip(rows(), weighted, strict=True):
        ids = torch.tensor([prompt + response])
        log_probs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        log_probs = log_probs.gather(1, torch.tensor(response)[:, None])[:, 0]
        ratio = (log_probs + 1.0).exp()
        losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
        # VeRL's dual clip: no loss of a negative advantage beyond three times the advantage.
        losses = torch.where(advantages < 0, torch.minimum(losses, -3.0 * advantages), losses)
        total = total + losses.sum() / count
    total.backward()
    parameters = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.cat([grad.flatten() for grad in parameters]).double().norm())


@pytest.mark.parametrize(
    ("run", "case"), [(run, case) for run, case in EVERY_CASE if case != "lora"]
)
def test_gradients_are_those_of_the_weighted_loss(results, run, case):
    lengths = [len(response) for _, response in rows()]
    signs = [1.0 if row % 2 else -1.0 for row in range(ROWS)]
    named = [
        sign * (row + torch.arange(n) / 100)
        for row, (n, sign) in enumerate(zip(lengths, signs, strict=True))
    ]
    chosen = [sign * (torch.arange(n) < n // 2) for n, sign in zip(lengths, signs, strict=True)]
    selected = sum(n // 2 for n in lengths)
    expected = gradient_norm(named)
    expected_selected = gradient_norm(chosen) * sum(lengths) / selected  # a mean over the selected
    rel = allowed(case, "gradient")
    for result in results(run, case):
        if result["named_norm"] is not None:
            assert result["named_norm"] == pytest.approx(expected, rel=rel)
            assert result["selected_norm"] == pytest.approx(expected_selected, rel=rel)
