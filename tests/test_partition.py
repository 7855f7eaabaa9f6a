import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, masks, score_stacks, scored_masks

import tokenweights as tw
from tokenweights import TokenWeightsError

FRACTIONS = st.sampled_from([0.0, 0.1, 0.2, 1 / 3, 0.5, 0.7, 0.9, 1.0])


def exact_count(fraction: float, length: int) -> int:
    return math.ceil(Fraction(fraction).limit_denominator(1000) * length)


@given(scored_masks(dtypes=FLOATS), FRACTIONS)
def test_equation_16_bottom_and_top_agree_with_a_python_sort(case, fraction):
    scores, mask = case
    bottom = tw.bottom_fraction(scores, mask, fraction=fraction)
    top = tw.top_fraction(scores, mask, fraction=fraction)
    for row in range(mask.shape[0]):
        places = mask[row].nonzero().flatten().tolist()
        order = sorted(places, key=lambda place: (scores[row, place].item(), place))
        k = exact_count(fraction, len(order))
        assert set(bottom[row].nonzero().flatten().tolist()) == set(order[:k])
        assert set(top[row].nonzero().flatten().tolist()) == set(order[len(order) - k :])


@pytest.mark.parametrize(
    ("fraction", "length", "count"), [(0.1, 30, 3), (0.2, 5, 1), (0.2, 6, 2), (0.07, 100, 7)]
)
def test_float_rounding_never_adds_a_token(fraction, length, count):
    mask = torch.ones(1, length, dtype=torch.bool)
    assert tw.bottom_fraction(torch.rand(1, length), mask, fraction=fraction).sum() == count
    assert tw.random_fraction(mask, fraction=fraction, seed=1).sum() == count


@given(masks(), FRACTIONS)
def test_equation_18_front_and_back(mask, fraction):
    front = tw.front_fraction(mask, fraction=fraction)
    back = tw.back_fraction(mask, fraction=fraction)
    share = Fraction(fraction).limit_denominator(1000)
    for row in range(mask.shape[0]):
        places = mask[row].nonzero().flatten().tolist()
        numbered = [(Fraction(t, len(places)), place) for t, place in enumerate(places, start=1)]
        assert front[row].nonzero().flatten().tolist() == [p for x, p in numbered if x <= share]
        assert back[row].nonzero().flatten().tolist() == [p for x, p in numbered if x > 1 - share]


@given(scored_masks(dtypes=FLOATS), st.integers(1, 15))
def test_bins_are_even_and_ordered(case, bins):
    scores, mask = case
    labels = tw.quantile_bins(scores, mask, bins=bins)
    assert (labels[~mask] == -1).all()
    for row in range(mask.shape[0]):
        own = labels[row][mask[row]]
        sizes = torch.bincount(own, minlength=bins)
        assert sizes.shape == (bins,) and int(sizes.max() - sizes.min()) <= 1
        by_score = own[scores[row][mask[row]].argsort(stable=True)]
        assert (by_score.diff() >= 0).all()


def above_median(scores: list[float]) -> list[bool]:
    """By rational numbers: between neighbouring floats there is no float for their mean."""
    exact = [Fraction(score) for score in scores]
    return [score > statistics.median(exact) for score in exact]


@given(score_stacks(2, dtypes=FLOATS))
def test_equation_22_quadrants_agree_with_exact_medians(case):
    (first, second), mask = case
    quadrants = tw.median_quadrants(first, second, mask)
    assert (quadrants[~mask] == -1).all()
    for row in range(mask.shape[0]):
        a, b = (above_median(scores[row][mask[row]].tolist()) for scores in (first, second))
        expected = [one + 2 * other for one, other in zip(a, b, strict=True)]
        assert quadrants[row][mask[row]].tolist() == expected


@given(scored_masks(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.data())
def test_medians_of_neighbouring_scores_do_not_round(case, dtype, data):
    """Between two adjacent floats there is no float: the mean of the two would round to one."""
    mask = case[1]
    start = data.draw(st.floats(-60000, 60000, allow_subnormal=True, width=16))
    step = torch.tensor([start], dtype=dtype)
    ladder = [step := torch.nextafter(step, torch.full_like(step, torch.inf)) for _ in range(4)]
    scores = torch.cat(ladder)[(case[0].nan_to_num(0, 0, 0) * 3).long().clamp(0, 3)]
    quadrants = tw.median_quadrants(scores, -scores, mask)
    for row in range(len(mask)):
        values = scores[row][mask[row]].tolist()
        above, below = above_median(values), above_median([-value for value in values])
        expected = [one + 2 * other for one, other in zip(above, below, strict=True)]
        assert quadrants[row][mask[row]].tolist() == expected


@given(masks(), st.integers(0, 2**40), FRACTIONS)
def test_random_fraction_takes_exactly_its_share(mask, seed, fraction):
    subset = tw.random_fraction(mask, fraction=fraction, seed=seed)
    assert not (subset & ~mask).any()
    counts = [exact_count(fraction, length) for length in mask.sum(-1).tolist()]
    assert subset.sum(-1).tolist() == counts


def draws(mask, sample_ids, groups):
    return [
        tw.random_fraction(mask, fraction=0.3, seed=5, sample_ids=sample_ids),
        tw.bernoulli_subset(mask, probability=0.3, seed=5, sample_ids=sample_ids),
        tw.matched_random(groups == 1, mask, groups % 2, seed=5, sample_ids=sample_ids),
    ]


def test_random_draws_depend_on_sample_and_position_only():
    mask = torch.ones(3, 20, dtype=torch.bool)
    groups = torch.arange(60).view(3, 20) % 4
    state = torch.random.get_rng_state()
    whole = draws(mask, torch.tensor([7, 8, 9]), groups)
    shuffled = draws(mask, torch.tensor([9, 7, 8]), groups[[2, 0, 1]])
    padded = draws(
        torch.cat([torch.zeros(3, 4, dtype=torch.bool), mask], 1),
        torch.tensor([7, 8, 9]),
        torch.cat([torch.full((3, 4), 3), groups], 1),
    )
    for one, other, wider in zip(whole, shuffled, padded, strict=True):
        assert torch.equal(one[[2, 0, 1]], other)
        assert torch.equal(one, wider[:, 4:]) and not wider[:, :4].any()
    assert torch.equal(state, torch.random.get_rng_state())


def test_random_draws_are_uniform_and_differ_between_seeds_and_samples():
    mask = torch.ones(4000, 10, dtype=torch.bool)
    subset = tw.random_fraction(mask, fraction=0.2, seed=0)
    # Each of 10 positions is drawn with chance 0.2: 800 of 4000, standard deviation 25.
    assert (subset.sum(0) - 800).abs().max() < 5 * 25
    # Neighbouring samples agree in a token with chance 0.2 * 0.2.
    both = (subset[1:] & subset[:-1]).float().mean().item()
    assert both == pytest.approx(0.04, abs=0.004)
    other = tw.random_fraction(mask, fraction=0.2, seed=1)
    assert (subset & other).float().mean().item() == pytest.approx(0.04, abs=0.004)
    drawn = tw.bernoulli_subset(mask, probability=0.2, seed=0).float()
    assert drawn.mean().item() == pytest.approx(0.2, abs=0.01)
    assert drawn.sum(-1).var().item() == pytest.approx(1.6, rel=0.1)


@given(scored_masks(), st.integers(0, 100))
def test_matched_random_keeps_the_count_of_every_group(case, seed):
    scores, mask = case
    subset = mask & (scores > 0.5)
    groups = torch.where(mask, (scores.nan_to_num(0, 0, 0) * 3).long(), 99)
    chosen = tw.matched_random(subset, mask, groups, seed=seed)
    assert not (chosen & ~mask).any()
    for label in range(4):
        members = groups == label
        assert torch.equal((chosen & members).sum(-1), (subset & members).sum(-1))


def test_seed_and_sample_id_are_not_interchangeable():
    mask = torch.ones(1, 200, dtype=torch.bool)
    one = tw.random_fraction(mask, fraction=0.5, seed=1, sample_ids=torch.tensor([4]))
    other = tw.random_fraction(mask, fraction=0.5, seed=2, sample_ids=torch.tensor([3]))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("fraction", [1e-7, 1e-10, 5e-324])
def test_a_tiny_fraction_still_takes_a_token(fraction):
    mask = torch.ones(1, 5, dtype=torch.bool)
    assert tw.bottom_fraction(torch.rand(1, 5), mask, fraction=fraction).sum() == 1
    assert tw.random_fraction(mask, fraction=fraction, seed=0).sum() == 1
    assert tw.back_fraction(mask, fraction=fraction).sum() == 1
    assert tw.front_fraction(mask, fraction=fraction).sum() == 0  # t / T <= f holds for no t


def test_matched_random_draws_uniformly_within_a_group():
    mask = torch.ones(4000, 6, dtype=torch.bool)
    groups = torch.tensor([0, 0, 0, 0, 1, 1]).expand(4000, 6)
    subset = torch.tensor([True, False, False, False, False, True]).expand(4000, 6)
    rates = tw.matched_random(subset, mask, groups, seed=3).float().mean(0)
    expected = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.5, 0.5])
    torch.testing.assert_close(rates, expected, atol=0.04, rtol=0)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_responses(length):
    mask = torch.arange(3)[None] < length
    scores = torch.full((1, 3), 0.5)
    k = min(length, 1)
    assert tw.bottom_fraction(scores, mask).sum() == k
    assert tw.top_fraction(scores, mask).sum() == k
    assert tw.front_fraction(mask).sum() == 0
    assert tw.back_fraction(mask).sum() == k
    assert (tw.quantile_bins(scores, mask, bins=10) >= 0).sum() == length


ONE = torch.ones(1, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tw.bottom_fraction(torch.rand(1, 2), ONE, fraction=1.5),
        lambda: tw.top_fraction(torch.rand(1, 2), ONE, fraction=-0.1),
        lambda: tw.top_fraction(torch.rand(1, 2), ONE, fraction=math.nan),
        lambda: tw.front_fraction(ONE, fraction=2.0),
        lambda: tw.back_fraction(ONE, fraction=2.0),
        lambda: tw.random_fraction(ONE, fraction=2.0, seed=0),
        lambda: tw.bernoulli_subset(ONE, probability=2.0, seed=0),
        lambda: tw.quantile_bins(torch.rand(1, 2), ONE, bins=0),
        lambda: tw.quantile_bins(torch.rand(1, 2), ONE, bins=10**19),
        lambda: tw.bottom_fraction(torch.tensor([[0.0, math.nan]]), ONE),
        lambda: tw.top_fraction(torch.tensor([[0.0, math.inf]]), ONE),
        lambda: tw.median_quadrants(torch.tensor([[0.0, math.nan]]), torch.rand(1, 2), ONE),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(TokenWeightsError, match="expected"):
        make()


@given(masks(), st.integers(0, 14))
def test_first_tokens_are_the_first_valid_ones(mask, count):
    got = tw.first_tokens(mask, count=count)
    for row in range(len(mask)):
        assert (
            got[row].nonzero().flatten().tolist()
            == (mask[row].nonzero().flatten().tolist()[:count])
        )


def test_more_first_tokens_than_there_are_take_all():
    mask = torch.tensor([[True, False, True]])
    assert torch.equal(tw.first_tokens(mask, count=2**70), mask)


def test_a_negative_count_of_first_tokens_is_refused():
    with pytest.raises(TokenWeightsError, match="count"):
        tw.first_tokens(torch.ones(1, 1, dtype=torch.bool), count=-1)
