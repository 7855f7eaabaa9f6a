"""Rules of the field beside their formulas, read anew in NumPy and float64 on one whole batch.

The quantities are those of the policy that sampled, as the recipes have it; papers that take the
current policy's have the same at the first inner step.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from recipes import test_preplan

import tokenweights as tw
from tokenweights import Recipe, RolloutBatch, TokenWeightsError
from tokenweights.recipes import field, kinds, signals

LENGTHS = [41, 9, 30, 17, 24, 1, 38, 12, 27, 0, 33]
PROMPTS = [3, 3, 3, 3, 8, 8, 8, 5, 5, 5, 1]
ADVANTAGES = [1.4, -0.6, -1.1, 0.3, 2.1, 0.0, -0.9, -1.7, 0.8, 1.0, 1.9]
HALVES = [0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0]


def drawn(*, entropy: float = 0.2) -> RolloutBatch:
    """Responses to four prompts, of mean entropy below or above 0.3, with NaN off the mask."""
    random = np.random.default_rng(5)
    shape = (len(LENGTHS), max(LENGTHS) + 3)
    mask = np.arange(shape[1]) < np.array(LENGTHS)[:, None]
    mask = random.permuted(mask, axis=1)  # with holes
    log_probs = np.where(
        random.random(shape) < 0.1,
        random.uniform(-11, -6.3, shape),
        -random.exponential(0.6, shape),
    )

    def column(values):
        return torch.from_numpy(np.where(mask, values, np.nan)).float()

    return RolloutBatch(
        mask=torch.from_numpy(mask),
        sample_ids=torch.arange(len(LENGTHS)) * 7 % 11,
        prompt_ids=torch.tensor(PROMPTS),
        advantages=torch.tensor(ADVANTAGES)[:, None],
        log_probs=column(log_probs),
        sampler_log_probs=column(log_probs + random.normal(0, 0.6, shape)),
        predictive_entropy=column(random.gamma(0.7, entropy / 0.7, shape)),
        self_certainty=column(random.gamma(2.0, 3.0, shape)),
    )


@dataclass(frozen=True)
class Tokens:
    """The valid tokens of a batch one after another, as float64."""

    response: np.ndarray
    prompt: np.ndarray
    advantage: np.ndarray
    log_prob: np.ndarray
    sampler: np.ndarray
    entropy: np.ndarray
    certainty: np.ndarray

    @property
    def probability(self):
        return np.exp(self.log_prob)

    def __len__(self):
        return len(self.response)

    def __getitem__(self, chosen):
        return Tokens(*(getattr(self, item.name)[chosen] for item in dataclasses.fields(self)))


def tokens_of(batch: RolloutBatch) -> Tokens:
    mask = batch.mask

    def valid(column):
        return column.expand(mask.shape)[mask].double().numpy()

    rows = torch.arange(len(mask))[:, None].expand(mask.shape)[mask].numpy()
    return Tokens(
        rows,
        batch.prompt_ids.numpy()[rows],
        *(
            valid(getattr(batch, name))
            for name in (
                "advantages", "log_probs", "sampler_log_probs", "predictive_entropy",
                "self_certainty",
            )
        ),
    )  # fmt: skip


def weights_of(recipe: str | Recipe | dict, batch: RolloutBatch) -> np.ndarray:
    """What the library gives to the valid tokens."""
    return tw.recipe(recipe).weighted(batch, step=0).weights[batch.mask].double().numpy()


# The formulas.


def highest(scores, share: str):
    """True for the highest ceil(share n) scores; the share is the ratio that its decimals say."""
    count = math.ceil(Fraction(share) * len(scores))
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[np.argsort(scores)[len(scores) - count :]] = True
    return chosen


def entropy_mask(t: Tokens):
    return highest(t.entropy, "0.2") * 1.0


def entropy_threshold(t: Tokens):
    return (t.entropy >= np.quantile(t.entropy, 0.8)) * 1.0


def stare(t: Tokens, damp: float = 1.0):
    """The public code takes max(1, ceil(0.1 n)) tokens of each sign by surprisal."""
    weights = np.ones(len(t))
    if t.entropy.mean() >= 0.3:
        return weights
    for sign, factor in ((1, 1.1), (-1, damp)):
        own = np.flatnonzero(np.sign(t.advantage) == sign)
        weights[own[highest(-t.log_prob[own], "0.1")]] = factor
    return weights


def stare_both(t: Tokens):
    return stare(t, 0.9)


def reweighting(t: Tokens):
    return 0.3 * t.probability + 1 - 0.3


def simplified_gtpo(t: Tokens):
    return np.maximum(0, 1 + 0.1 * (t.entropy / t.entropy.mean() - 1))


def factor_of(t: Tokens, shaped):
    """Shaped advantages over the advantages; 1 where the advantage is 0."""
    return np.where(t.advantage == 0, 1, shaped / np.where(t.advantage == 0, 1, t.advantage))


def exploration(t: Tokens):
    return factor_of(t, t.advantage + np.minimum(0.4 * t.entropy, abs(t.advantage) / 2))


def position(t: Tokens):
    """The relative position counts from 1: the last token is at 1."""
    place = np.empty(len(t))
    for number in np.unique(t.response):
        own = t.response == number
        place[own] = np.arange(1, own.sum() + 1) / own.sum()
    step = 1 / (1 + np.exp(-15 * (place - 0.5)))
    term = np.minimum(0.1 * step, abs(t.advantage) / 2)
    return factor_of(t, t.advantage + np.sign(t.advantage) * term)


def z_of_responses(t: Tokens, statistic):
    """z-scores of responses in their prompt's group, by the population's deviation."""
    z = np.zeros(len(t))
    for prompt in np.unique(t.prompt):
        numbers = np.unique(t.response[t.prompt == prompt])
        values = np.array([statistic(t[t.response == number]) for number in numbers])
        if len(values) > 1:
            for number, value in zip(numbers, values, strict=True):
                z[t.response == number] = (value - values.mean()) / values.std()
    return z


def perplexity(t: Tokens):
    """Fluent responses gain where A > 0, and perplexing ones where A < 0: 1 - 0.01 z and + 0.01 z.

    Our recipe's reading of the sign in "1 -/+ 0.01 z".
    """
    z = z_of_responses(t, lambda own: -own.log_prob.mean())
    shaped = np.clip(1 - np.sign(t.advantage) * 0.01 * z, 0.8, 1.2)
    return np.where(t.advantage == 0, 1, shaped)


def certainty(t: Tokens):
    """The recipe's z-score has the population's deviation, and a response alone has z = 0."""
    z = z_of_responses(t, lambda own: own.certainty.sum())
    weights = np.where(t.advantage > 0, np.exp(-0.25 * z), np.exp(0.35 * z))
    return np.where(t.advantage == 0, 1, weights)


def truncated_ratio(t: Tokens):
    return np.minimum(np.exp(t.log_prob - t.sampler), 2.0)


def banded_ratio(t: Tokens):
    ratio = np.exp(t.log_prob - t.sampler)
    return np.where((ratio >= 0.5) & (ratio <= 5.0), ratio, 0)


def relative_surprisal(t: Tokens):
    ratio = -t.log_prob / t.entropy
    return ((ratio >= 0.1) & (ratio <= 3.0)) * 1.0


def rare_positives(t: Tokens, older: bool = False):
    rare = (t.advantage > 0) & (t.probability < 0.002)
    if older:
        threshold = np.quantile(t.entropy, 0.8)
    else:
        threshold = np.quantile(t.entropy[rare], 0.75)
    return 1.0 - (rare & (t.entropy < threshold))


def older_rare_positives(t: Tokens):
    return rare_positives(t, older=True)


def second_moment(t: Tokens):
    """The largest are dropped, one by one, while the mean square of the rest is above 0.04."""
    change = t.log_prob - t.sampler
    kept = sorted(np.flatnonzero(t.advantage * change > 0), key=lambda i: change[i] ** 2)
    weights = np.ones(len(t))
    while kept and (change[kept] ** 2).mean() > 0.04:
        weights[kept.pop()] = 0
    return weights


def steer(t: Tokens):
    p = t.probability
    omega = t.advantage / p * p * (1 - p) * (t.log_prob + t.entropy)
    rate = -math.log(0.8) / max(abs(omega).max(), 0.02)
    return np.exp(-rate * abs(omega))


def quadrant(sign: int, end: int):
    def reading(t: Tokens):
        """Half of the tokens of each response of that sign, by entropy; the middle one as well."""
        weights = np.zeros(len(t))
        for number in np.unique(t.response):
            own = np.flatnonzero((t.response == number) & (np.sign(t.advantage) == sign))
            weights[own[highest(end * t.entropy[own], "0.5")]] = 1
        return weights

    return reading


def covariance(t: Tokens):
    return (t.advantage - t.advantage.mean()) * (t.log_prob - t.log_prob.mean())


READINGS = {
    "predictive_high20_batch": entropy_mask,
    "predictive_high20_batch_all_tokens": entropy_mask,
    "predictive_above80_batch": entropy_threshold,
    "predictive_above80_batch_all_tokens": entropy_threshold,
    "surprisal_boost10": stare,
    "surprisal_boost10_damp10": stare_both,
    "probability_weighted": reweighting,
    "entropy_proportional": simplified_gtpo,
    "entropy_bonus": exploration,
    "position_bonus": position,
    "perplexity_shaping": perplexity,
    "certainty_shaping": certainty,
    "relative_surprisal_band": relative_surprisal,
    "sampler_ratio_truncated": truncated_ratio,
    "sampler_ratio_band": banded_ratio,
    "positive_high_entropy50": quadrant(1, 1),
    "positive_low_entropy50": quadrant(1, -1),
    "negative_high_entropy50": quadrant(-1, 1),
    "negative_low_entropy50": quadrant(-1, -1),
    "rare_positives_drop": rare_positives,
    "rare_positives_drop_older": older_rare_positives,
    "second_moment_drop": second_moment,
    "entropy_change_damped": steer,
}


def test_every_rule_of_the_field_has_a_reading():
    elsewhere = {"covariance_drop", *test_preplan.SETS, *test_preplan.CONTROLS}
    assert set(READINGS) | elsewhere == set(tw.recipe_names(source="field"))


@pytest.mark.parametrize("name", READINGS)
@pytest.mark.parametrize("entropy", [0.2, 1.5])
def test_a_recipe_is_its_formula(name, entropy):
    batch = drawn(entropy=entropy)
    want = READINGS[name](tokens_of(batch))
    np.testing.assert_allclose(weights_of(name, batch), want, rtol=1e-6, atol=1e-6)
    is_gated = name.startswith("surprisal_boost") and entropy > 0.3
    assert (np.abs(want - 1).max() < 1e-3) == is_gated


def test_the_two_denominators_of_the_entropy_mask():
    batch = drawn()
    loss = np.random.default_rng(0).normal(size=int(batch.mask.sum()))
    for rule in ("predictive_high20_batch", "predictive_above80_batch"):
        want = READINGS[rule](tokens_of(batch))
        for name, count in ((rule, want.sum()), (f"{rule}_all_tokens", len(want))):
            rollout = tw.recipe(name).weighted(batch, step=0)
            factors = (rollout.weights * rollout.scale)[batch.mask].double().numpy()
            assert (factors * loss).mean() == pytest.approx((want * loss).sum() / count, rel=1e-6)


def test_a_threshold_takes_all_ties_and_a_count_does_not():
    entropy = torch.tensor([[0.1, 0.5, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1]])
    batch = RolloutBatch(mask=torch.ones(1, 10).bool(), predictive_entropy=entropy)
    assert weights_of("predictive_above80_batch", batch).sum() == 4
    assert weights_of("predictive_high20_batch", batch).tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]


def test_a_share_is_rounded_up():
    for tokens, chosen in ((1, 1), (10, 1), (11, 2), (30, 3), (70, 7)):
        batch = RolloutBatch(
            mask=torch.ones(1, tokens).bool(),
            log_probs=-torch.arange(1.0, tokens + 1)[None],
            advantages=torch.ones(1, 1),
            predictive_entropy=torch.zeros(1, tokens),
        )
        assert (weights_of("surprisal_boost10", batch) > 1).sum() == chosen


@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_small_changes_are_damped_by_a_floor_on_the_largest(size):
    batch = dataclasses.replace(drawn(), advantages=size * drawn().advantages)
    want = steer(tokens_of(batch))
    assert (want.min() > 0.9) == (size < 1)
    np.testing.assert_allclose(
        weights_of("entropy_change_damped", batch), want, rtol=1e-6, atol=1e-6
    )


def test_what_a_prompt_of_one_response_gives():
    batch = drawn().rows([10])
    for name in ("perplexity_shaping", "certainty_shaping"):
        assert (weights_of(name, batch) == 1).all()


# Tokens at random.


def dropped(seed: int, fraction: float, batch: RolloutBatch, scores: torch.Tensor):
    rule = field.RandomDrop(low=1.0, high=5.0, fraction=fraction, seed=seed)
    return rule(scores, batch, step=0)[batch.mask].numpy() == 0


@pytest.mark.parametrize(("fraction", "count"), [(2e-4, 1), (0.02, 4), (0.05, 11), (1.0, None)])
def test_random_tokens_of_the_covariance_band_are_dropped(fraction, count):
    """Count and candidates; the choice is by keys of sample and position, no permutation."""
    batch = drawn()
    tokens = tokens_of(batch)
    assert len(tokens) == 232
    band = (covariance(tokens) > 1) & (covariance(tokens) < 5)
    weights = weights_of({"name": "covariance_drop", "fraction": fraction}, batch)
    assert set(weights) <= {0.0, 1.0} and not (weights[~band] == 0).any()
    assert (weights == 0).sum() == (band.sum() if count is None else min(count, band.sum()))
    if count:
        assert count == max(int(fraction * len(tokens)), 1)


def test_the_drop_is_uniform_over_seeds():
    """One of the candidates for each of 600 seeds; a chi-square of mean m has deviation sqrt 2m."""
    batch = drawn()
    scores = signals.Covariance()(batch)
    band = ((scores > 1) & (scores < 5))[batch.mask].numpy()
    counts = sum(dropped(seed, 2e-4, batch, scores) * 1 for seed in range(600))[band]
    assert counts.sum() == 600 and len(counts) > 12
    expected, freedom = 600 / len(counts), len(counts) - 1
    distance = ((counts - expected) ** 2 / expected).sum()
    assert abs(distance - freedom) < 6 * math.sqrt(2 * freedom)


# Where released code looks at one micro-batch.

MICRO = {
    "predictive_high20_batch": entropy_mask,
    "predictive_above80_batch": entropy_threshold,
    "surprisal_boost10_damp10": stare_both,
    "second_moment_drop": second_moment,
    "entropy_change_damped": steer,
}


def half(batch: RolloutBatch, number: int) -> RolloutBatch:
    return batch.rows([row for row, owner in enumerate(HALVES) if owner == number])


def weights_of_a_half(rank, size):
    own = dataclasses.replace(half(drawn(), rank), group=dist.group.WORLD)
    return {name: weights_of(name, own) for name in (*MICRO, "covariance_drop")}


def test_released_code_depends_on_the_split_and_the_recipes_do_not():
    batch = drawn()
    tokens = tokens_of(batch)
    first = np.array(HALVES)[tokens.response] == 0
    ours = on_ranks(weights_of_a_half, 2)
    for name, reading in MICRO.items():
        whole, split, together = reading(tokens), np.empty(len(tokens)), np.empty(len(tokens))
        for own, weights in ((first, ours[0][name]), (~first, ours[1][name])):
            split[own] = reading(tokens[own])
            together[own] = weights
        np.testing.assert_allclose(together, whole, rtol=1e-6, atol=1e-6, err_msg=name)
        assert np.abs(split - whole).max() > 1e-3, name
    # A token for each micro-batch, however many there are, of other candidates.
    bands = [(covariance(t) > 1) & (covariance(t) < 5) for t in (tokens[first], tokens[~first])]
    split = np.empty(len(tokens), dtype=bool)
    split[first], split[~first] = bands
    assert (split != ((covariance(tokens) > 1) & (covariance(tokens) < 5))).any()
    assert all(band.any() for band in bands)
    assert sum((part["covariance_drop"] == 0).sum() for part in ours) == 1


# Numbers at the edge of their type.


def test_bounds_are_those_of_the_scores_type():
    rule = field.Within(low=0.1, high=0.3)
    for dtype in (torch.float32, torch.float64):
        edges = torch.tensor([[0.1, 0.3, 0.1 - 1e-6, 0.3 + 1e-6]], dtype=dtype)
        batch = RolloutBatch(mask=torch.ones(1, 4).bool())
        assert rule(edges, batch, step=0).tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_probability_is_compared_at_full_precision(dtype):
    log_probs = torch.log(torch.tensor([[0.001, 0.00199, 0.00201, 0.003]])).to(dtype)
    batch = RolloutBatch(
        mask=torch.ones(1, 4).bool(),
        log_probs=log_probs,
        predictive_entropy=torch.tensor([[0.0, 0.0, 0.0, 1.0]]),
        advantages=torch.ones(1, 1),
    )
    rule = field.RarePositives(among="all", quantile=1.0)
    dropped = rule(None, batch, step=0) == 0
    assert torch.equal(dropped, log_probs.double().exp() < 0.002)


@pytest.mark.parametrize("advantage", [1e-38, 1e-3, 1e4])
def test_a_bonus_never_turns_the_advantage(advantage):
    batch = RolloutBatch(
        mask=torch.ones(2, 2).bool(), advantages=torch.tensor([[advantage], [-advantage]])
    )
    scores = torch.tensor([[0.0, 3e38], [-1.0, 3e38]])
    weights = field.Bonus(scale=0.4, share=2.0)(scores, batch, step=0)
    assert weights.tolist() == [[1.0, 1.5], [1.0, 0.5]]


SILENT = [
    ("rare_positives_drop", "log_probs"),
    ("rare_positives_drop", "predictive_entropy"),
    ("second_moment_drop", "log_probs"),
    ("second_moment_drop", "sampler_log_probs"),
]


@pytest.mark.parametrize(("name", "column"), SILENT)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_rule_refuses_what_is_not_finite(name, column, value):
    batch = drawn()
    values = getattr(batch, column).clone()
    row, place = batch.mask.nonzero()[-1]
    values[row, place] = value
    with pytest.raises(TokenWeightsError, match="finite"):
        tw.recipe(name).weighted(dataclasses.replace(batch, **{column: values}), step=0)


@pytest.mark.parametrize("made", field.ALL, ids=lambda made: made.kind)
def test_rules_of_the_field_travel_as_text(made):
    needed = {"low": 0.1, "high": 3.0, "scale": 0.3}
    names = [item.name for item in dataclasses.fields(made)]
    required = [n for n in names if n in needed and n not in made.__dict__]
    part = made(**{name: needed[name] for name in required})
    text = json.loads(json.dumps(kinds.part_values(part)))
    assert kinds.part_from(text, role="rule") == part and text["kind"] == made.kind
