"""The shared part of the adapters: weights, scale and metrics of a rollout batch."""

import math
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks
from strategies import scored_masks

import tokenweights as tw
from tokenweights import RolloutBatch, TokenWeightsError
from tokenweights.attention import EntropyKind
from tokenweights.losses import Denominator
from tokenweights.recipes.rules import EndpointWeights, ScheduleKind
from tokenweights.recipes.signals import AttentionEntropy

RECIPES = ["full", "low2high", "anchor20", "random20", "position_matched20"]


def batch():
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(12) < torch.tensor([12, 7, 1, 0])[:, None]
    scores = torch.rand(4, 12, generator=generator)
    return scores.masked_fill(~mask, torch.nan), mask


def rollout(name, rows=slice(None), group=None):
    scores, mask = batch()
    made = tw.recipe(name)
    return tw.weighted_rollout(
        made,
        None if made.signal is None else scores[rows],
        mask[rows],
        step=30,
        sample_ids=torch.arange(4)[rows],
        group=group,
    )


@pytest.mark.parametrize("name", RECIPES)
def test_it_holds_what_the_recipe_says(name):
    scores, mask = batch()
    made, whole = tw.recipe(name), rollout(name)
    scores = None if made.signal is None else scores
    weights = made.token_weights(scores, mask, step=30, sample_ids=torch.arange(4))
    assert torch.equal(whole.weights, weights)
    assert torch.equal(whole.scale, made.denominator_scale(weights, mask))
    assert whole.metrics["weight_mean"] == pytest.approx(float(weights[mask].mean()))
    assert ("endpoint_low" in whole.metrics) == isinstance(made.rule, EndpointWeights)


def test_a_batch_without_tokens_has_no_metrics():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    made = tw.weighted_rollout(tw.recipe("low2high"), torch.zeros(2, 3), nothing, step=0)
    assert made.metrics == {} and not made.weights.any()


def test_missing_scores_are_refused():
    with pytest.raises(TokenWeightsError, match="scores"):
        tw.weighted_rollout(tw.recipe("low2high"), None, batch()[1], step=0)


def test_the_recipe_of_a_trainer_comes_as_name_fields_or_text():
    made = tw.recipe({"name": "anchor20", "fraction": 0.4})
    for choice in (made, made.to_dict(), '{"name": "anchor20", "fraction": 0.4}'):
        assert tw.rollout_recipe(choice, caller="train") == made
    for choice, message in (
        (None, "a recipe name or a dict"),
        ("", "a recipe name or a dict"),
        ("{name: anchor20}", "valid JSON"),
        ("anchro20", "Did you mean 'anchor20'"),
        ("loss_low20", "other than loss_magnitude"),
        (tw.recipe("loss_high20"), "other than loss_magnitude"),
    ):
        with pytest.raises(TokenWeightsError, match=message):
            tw.rollout_recipe(choice, caller="train")


def rows_of_a_rank(rank, size):
    rows = slice(rank * 2, rank * 2 + 2)
    return [rollout(name, rows, dist.group.WORLD) for name in RECIPES]


def test_ranks_equal_the_whole():
    for name, *parts in zip(RECIPES, *on_ranks(rows_of_a_rank, 2), strict=True):
        whole = rollout(name)
        torch.testing.assert_close(torch.cat([part.weights for part in parts]), whole.weights)
        for part in parts:
            torch.testing.assert_close(part.scale, whole.scale)
            assert part.metrics == pytest.approx(whole.metrics)


FRACTIONS = st.sampled_from([0.0, 1, 1e-300, 1 / 3]) | st.floats(0, 1)
WEIGHTS = st.sampled_from([0.0, 1, 5e-324, 1e-40, 1e-20, 1e30, 1e31, math.inf]) | st.floats(0, 2)
NUMBERS = st.sampled_from([-1e30, -1, 0, 1e-300, 1e300]) | st.floats(-3, 3)
SCALES = st.sampled_from([5e-324, 1e-40, 1e-8, 1.0, 1e40, 1e300])
WHOLE = st.sampled_from([1, 10, 10**6, 10**7, 2**63 - 1, 2**63, 2**70])
SEEDS = st.sampled_from([0, -1, 2**64, -(2**70)])
SIDES = st.sampled_from(["bottom", "top"])
SCOPES = st.sampled_from(["response", "prompt", "batch"])
SIGNS = st.sampled_from(["any", "positive", "negative"])
PAIRS = st.lists(WEIGHTS, min_size=2, max_size=2)
EDGE = {"fraction": FRACTIONS, "scope": SCOPES, "sign": SIGNS, "inside": WEIGHTS}
FIELDS = {
    "uniform": {},
    "endpoints": {
        "low": PAIRS,
        "high": PAIRS,
        "schedule": st.sampled_from(get_args(ScheduleKind)),
        "warmup_steps": st.sampled_from([0, 1, 100, 10**400]),
        "temperature": SCALES,
        "form": st.sampled_from(["stable", "literal"]),
        "eps": SCALES,
    },
    "bottom": EDGE,
    "top": EDGE,
    "front": {"fraction": FRACTIONS},
    "random": {"fraction": FRACTIONS, "seed": SEEDS},
    "bernoulli": {"fraction": FRACTIONS, "seed": SEEDS},
    "position_matched": {
        "fraction": FRACTIONS,
        "seed": SEEDS,
        "matched_to": SIDES,
        "position_bins": WHOLE,
    },
    "mapped": {
        "normalise": st.sampled_from(["none", "mean", "deviation", "range"]),
        "scope": SCOPES,
        "per": st.sampled_from(["token", "response"]),
        "shape": st.sampled_from(["linear", "exponential", "sigmoid"]),
        "slope": NUMBERS,
        "offset": NUMBERS,
        "low": WEIGHTS,
        "high": WEIGHTS,
    },
    "within": {"low": NUMBERS, "high": NUMBERS, "weight": st.sampled_from(["one", "score"])},
    "above_quantile": {"quantile": FRACTIONS, "scope": SCOPES},
    "bonus": {
        "scale": NUMBERS,
        "share": NUMBERS,
        "towards": st.sampled_from(["plus", "sign"]),
    },
    "random_drop": {"low": NUMBERS, "high": NUMBERS, "fraction": FRACTIONS, "seed": SEEDS},
    "damped": {"floor": WEIGHTS, "least": SCALES},
}


@st.composite
def fields_of_recipes(draw):
    """Fields of the right types, extreme values and some that no batch could run on."""
    kind = draw(st.just("endpoints") | st.sampled_from(sorted(FIELDS)))
    rule = {"kind": kind} | {name: draw(values) for name, values in FIELDS[kind].items()}
    scored = kind not in ("uniform", "front", "random", "bernoulli")
    return {
        "rule": rule,
        "signal": "predictive_entropy" if scored else None,
        "denominator": draw(st.sampled_from(get_args(Denominator))),
        "match_mass": draw(st.booleans()),
    }


@given(fields_of_recipes(), scored_masks(), st.sampled_from([0, 1, 50, 10**30]))
def test_whatever_recipe_is_accepted_runs(fields, case, step):
    """But for weights that float32 cannot hold times their scale, which the scores decide."""
    try:
        made = tw.recipe(fields)
    except TokenWeightsError:
        return
    scores, mask = case
    batch = RolloutBatch(
        mask=mask,
        prompt_ids=torch.arange(len(mask)) // 2,
        advantages=torch.linspace(-1, 1, len(mask))[:, None],
        predictive_entropy=scores.float(),
    )
    try:
        rollout = made.weighted(batch, step=step)
    except TokenWeightsError as error:
        small = "`weights` with a mean of 0, or of at least" in str(error)
        assert (small and made.denominator == "weight_sum") or "`weights` at most" in str(error)
        return
    assert (rollout.weights >= 0).all()
    assert torch.isfinite(rollout.weights * rollout.scale).all()
    assert all(map(math.isfinite, rollout.metrics.values()))


@given(st.sampled_from(get_args(EntropyKind)), WHOLE.filter(lambda k: k < 2**63), st.integers(1, 9))
def test_whatever_size_an_attention_signal_takes_runs(kind, size, keys):
    made = AttentionEntropy(entropy_kind=kind, top_k=size, fixed_k=size)
    query = torch.rand(1, 1, keys, 2)
    entropy = tw.attention_entropy(
        query, query, kind=made.entropy_kind, top_k=made.top_k, fixed_k=made.fixed_k
    )
    assert torch.isfinite(entropy).all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"low": [1e31, 0]}, "each 0 or in [1e-20, 1e30], got (1e+31, 0)"),
        ({"high": [1e-40, 1]}, "each 0 or in [1e-20, 1e30], got (1e-40, 1)"),
        (
            {"name": "position_matched20", "position_bins": 10**7},
            "`position_bins` in [1, 1000000], got 10000000",
        ),
        ({"top_k": 2**63}, "`top_k` in [1, 2**63)"),
        ({"fixed_k": 2**70}, "`fixed_k` in [1, 2**63)"),
    ],
)
def test_what_could_not_run_is_refused_when_it_is_made(fields, words):
    with pytest.raises(TokenWeightsError) as error:
        tw.recipe({"name": "low2high", **fields})
    assert words in str(error.value)


@pytest.mark.parametrize("name", RECIPES)
def test_no_rule_takes_a_negative_step(name):
    scores, mask = batch()
    made = tw.recipe(name)
    scores = None if made.signal is None else scores
    with pytest.raises(TokenWeightsError, match="`step` >= 0, got -1"):
        tw.weighted_rollout(made, scores, mask, step=-1)
