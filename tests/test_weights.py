import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import scored_masks

import tokenweights as tw
from tokenweights import Endpoints, ScoreExtrema, TokenWeightsError

TEMPERATURES = st.sampled_from([1e-4, 1e-2, 0.1, 1.0, 10.0, 1e4])


def literal_alpha(scores: np.ndarray, temperature: float, eps: float) -> np.ndarray:
    """Eq. 26 and 27 as printed."""
    c = scores.max() / temperature
    alpha = np.exp(scores / temperature - c)
    alpha = alpha / (alpha.sum() + eps)
    return (alpha - alpha.min()) / (alpha.max() - alpha.min() + eps)


def test_equations_26_to_28_by_hand():
    # exp(H) = 1, 2, 3: abar = (x - 1) / 2.
    scores = torch.tensor([[0.0, math.log(2), math.log(3)]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    weights = tw.endpoint_weights(scores, mask, Endpoints(low=1.0, high=3.0))
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 3.0]]))


@given(scored_masks(), TEMPERATURES, st.sampled_from([1e-8, 1e-2]))
def test_both_forms_agree_with_the_printed_equations(case, temperature, eps):
    scores, mask = case
    ends = Endpoints(0.25, 2.0)
    valid = scores[mask].numpy()
    options = {"temperature": temperature}
    stable = tw.endpoint_weights(scores, mask, ends, **options)
    assert (stable[~mask] == 0).all() and torch.isfinite(stable).all()
    if valid.size == 0 or valid.min() == valid.max():
        assert (stable[mask] == 0.25).all()
        return
    low = np.exp((valid.min() - valid.max()) / temperature)
    exact = (np.exp((valid - valid.max()) / temperature) - low) / (1 - low)
    # At 1e4 the NumPy line cancels to about 1e-12; expm1 in the library does not.
    np.testing.assert_allclose(stable[mask].numpy(), 0.25 + 1.75 * exact, rtol=2e-6, atol=1e-7)
    literal = tw.endpoint_weights(scores, mask, ends, form="literal", eps=eps, **options)
    expected = 0.25 + 1.75 * literal_alpha(valid, temperature, eps)
    np.testing.assert_allclose(literal[mask].numpy(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["stable", "literal"])
@given(
    scored_masks(),
    TEMPERATURES,
    st.floats(0, 1e30) | st.sampled_from([0.0, 1.0, 0.1, 1e20]),
    st.floats(0, 1e30) | st.sampled_from([0.0, 1.0, 0.1, 1e20]),
)
def test_weights_lie_between_the_endpoints_and_reach_them(form, case, temperature, low, high):
    scores, mask = case
    ends = Endpoints(low, high)
    weights = tw.endpoint_weights(scores, mask, ends, temperature=temperature, form=form)[mask]
    bounds = torch.tensor(sorted([low, high]), dtype=torch.float32)
    assert ((weights >= bounds[0]) & (weights <= bounds[1])).all()
    valid = scores[mask]
    if form == "stable" and len(valid) and valid.min() < valid.max():
        assert (weights[valid == valid.min()] == torch.tensor(low, dtype=torch.float32)).all()
        assert (weights[valid == valid.max()] == torch.tensor(high, dtype=torch.float32)).all()


def test_an_endpoint_beside_a_far_larger_one_is_not_lost():
    scores, mask = torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    weights = tw.endpoint_weights(scores, mask, Endpoints(1e20, 1.0))
    assert torch.equal(weights, torch.tensor([[1e20, 1.0]]))


def test_the_literal_form_shrinks_with_the_batch_and_the_stable_one_does_not():
    mask = torch.ones(1, 2, dtype=torch.bool)
    scores, ends = torch.tensor([[0.2, 0.9]]), Endpoints(0.0, 1.0)
    extrema = tw.score_extrema(scores, mask)
    for tokens, largest in ((1e6, 0.99), (1e7, 0.88)):
        # A uniform spread of scores between the extrema, as a sum instead of as tokens.
        spread = np.linspace(0.2, 0.9, 10001)
        partition = torch.tensor(tokens * np.exp(spread - 0.9).mean())
        literal = tw.endpoint_weights(
            scores, mask, ends, extrema=extrema, form="literal", partition=partition
        )
        assert literal.max().item() == pytest.approx(largest, abs=0.006)
        assert tw.endpoint_weights(scores, mask, ends, extrema=extrema).max() == 1.0


@given(scored_masks(max_batch=4), TEMPERATURES, st.sampled_from(["stable", "literal"]))
def test_any_split_of_the_batch_gives_the_same_weights(case, temperature, form):
    scores, mask = case
    ends = Endpoints(1.0, 0.0)
    whole = tw.endpoint_weights(scores, mask, ends, temperature=temperature, form=form)
    extrema = tw.score_extrema(scores, mask)
    partition = tw.softmax_partition(scores, mask, extrema, temperature=temperature)
    for row in range(mask.shape[0]):
        part = tw.endpoint_weights(
            scores[row : row + 1],
            mask[row : row + 1],
            ends,
            temperature=temperature,
            form=form,
            extrema=extrema,
            partition=partition,
        )
        assert torch.equal(part, whole[row : row + 1])


def test_extreme_temperatures():
    scores, mask = torch.tensor([[0.0, 0.5, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    ends = Endpoints(0.0, 1.0)
    cold = tw.endpoint_weights(scores, mask, ends, temperature=1e-4)
    hot = tw.endpoint_weights(scores, mask, ends, temperature=1e4)
    assert cold.tolist() == [[0.0, 0.0, 1.0]]
    torch.testing.assert_close(hot, scores, atol=1e-4, rtol=0)


def test_the_smallest_temperature_does_not_overflow():
    scores, mask = torch.tensor([[0.0, 0.5, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    weights = tw.endpoint_weights(scores, mask, Endpoints(0.0, 1.0), temperature=1e-310)
    assert weights.tolist() == [[0.0, 0.0, 1.0]]


def test_equal_scores_take_the_low_endpoint_in_both_forms():
    scores, mask = torch.full((1, 3), 0.4), torch.ones(1, 3, dtype=torch.bool)
    for form in ("stable", "literal"):
        assert (tw.endpoint_weights(scores, mask, Endpoints(0.5, 1.0), form=form) == 0.5).all()


def test_weights_compile_in_one_graph():
    torch.compiler.reset()
    scores, mask = torch.tensor([[0.0, 0.5, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    ends = Endpoints(0.0, 1.0)
    compiled = torch.compile(
        lambda s, m: tw.endpoint_weights(s, m, ends), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(
        compiled(scores, mask), tw.endpoint_weights(scores, mask, ends), atol=0, rtol=0
    )


def test_ten_million_tokens_by_their_extrema():
    scores, mask = torch.tensor([[0.2, 0.55, 0.9]]), torch.ones(1, 3, dtype=torch.bool)
    few = tw.endpoint_weights(scores, mask, Endpoints(0.0, 1.0))
    wide = torch.linspace(0.2, 0.9, 10_000_001)[None]
    everyone = torch.ones_like(wide, dtype=torch.bool)
    extrema = tw.score_extrema(wide, everyone)
    many = tw.endpoint_weights(wide, everyone, Endpoints(0.0, 1.0), extrema=extrema)
    torch.testing.assert_close(many[0, [0, 5_000_000, 10_000_000]], few[0], atol=1e-6, rtol=1e-5)


@given(scored_masks(), st.floats(0.1, 5))
def test_match_mass_gives_the_target_mean_on_any_split(case, target):
    scores, mask = case
    weights = torch.where(mask, scores, torch.nan)
    matched = tw.match_mass(weights, mask, target=target)
    mass, count = tw.masked_sum(weights, mask), mask.sum().double()
    if mass > 0:
        assert matched.sum() / count == pytest.approx(target)
    else:
        assert (matched == 0).all()
    parts = [
        tw.match_mass(weights[r : r + 1], mask[r : r + 1], target=target, count=count, mass=mass)
        for r in range(mask.shape[0])
    ]
    if parts:
        torch.testing.assert_close(torch.cat(parts), matched)


def test_matched_weights_of_half_precision_do_not_overflow():
    weights = torch.zeros(1, 70000, dtype=torch.float16)
    weights[0, 0] = 0.5
    matched = tw.match_mass(weights, torch.ones(1, 70000, dtype=torch.bool))
    assert matched.dtype == torch.float32 and matched[0, 0] == 70000


def test_weights_are_detached_whatever_requires_a_gradient():
    mask = torch.ones(1, 3, dtype=torch.bool)
    scores = torch.tensor([[0.2, 0.5, 0.9]], requires_grad=True)
    extrema = ScoreExtrema(scores.amin(), scores.amax())
    for form in ("stable", "literal"):
        ends = Endpoints(0.0, 1.0)
        assert not tw.endpoint_weights(scores, mask, ends, form=form).requires_grad
        partition = scores.exp().sum()
        options = {"extrema": extrema, "form": form, "partition": partition}
        assert not tw.endpoint_weights(scores, mask, ends, **options).requires_grad
    total = scores.sum()
    for options in ({}, {"mass": total}, {"count": total}, {"mass": total, "count": total}):
        matched = tw.match_mass(scores, mask, **options)
        assert not matched.requires_grad and (matched > 0).all()


@pytest.mark.parametrize("size", [1e-320, 1e-200, 1e-40, 1e200])
def test_what_weights_do_depends_on_their_ratios_only(size):
    mask = torch.tensor([[True, True, True, False]])
    ratios = torch.tensor([[1.0, 2.0, 5.0, 7.0]], dtype=torch.float64)
    matched = tw.match_mass(ratios * size, mask)
    torch.testing.assert_close(matched, ratios * 3 / 8 * mask, rtol=1e-12, atol=0)
    statistics = tw.weight_statistics(ratios * size, mask, bin_count=3)
    assert statistics.effective_sample_size.item() == pytest.approx(64 / 30 / 3)
    torch.testing.assert_close(statistics.share, torch.tensor([1 / 8, 2 / 8, 5 / 8]))


def test_totals_of_the_batch_may_be_integers():
    weights, mask = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
    matched = tw.match_mass(weights, mask, count=mask.sum(), mass=torch.tensor(4))
    assert matched.tolist() == [[0.5, 1.5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extrema_of_a_narrow_dtype_do_not_narrow_the_weights(dtype):
    scores, mask = torch.tensor([[0.0, 0.3, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    narrow = ScoreExtrema(torch.tensor(0.0, dtype=dtype), torch.tensor(1.0, dtype=dtype))
    weights = tw.endpoint_weights(scores, mask, Endpoints(0.0, 1.0), extrema=narrow)
    assert weights[0, 1].item() == pytest.approx(math.expm1(0.3) / math.expm1(1), rel=1e-6)


@given(scored_masks())
def test_weight_statistics_agree_with_numpy(case):
    weights, mask = case
    statistics = tw.weight_statistics(weights, mask)
    w = weights[mask].numpy()
    if w.size == 0 or w.sum() == 0:
        assert statistics.mean == statistics.effective_sample_size == statistics.share.sum() == 0
        return
    assert statistics.mean.item() == pytest.approx(w.mean(), rel=1e-6)
    shares = w / w.max()  # the squares of the smallest weights are zero
    effective = shares.sum() ** 2 / (shares**2).sum() / w.size
    assert statistics.effective_sample_size.item() == pytest.approx(effective, rel=1e-6)
    assert statistics.share.sum().item() == pytest.approx(1, rel=1e-6)


def test_share_of_mass_in_given_bins():
    mask = torch.tensor([[True, True, True, False]])
    weights = torch.tensor([[1.0, 2.0, 5.0, 99.0]])
    bins = torch.tensor([[0, 0, 1, 7]])
    share = tw.weight_statistics(weights, mask, bins=bins, bin_count=2).share
    torch.testing.assert_close(share, torch.tensor([0.375, 0.625]))


ONE = torch.ones(1, 2, dtype=torch.bool)
HALF = torch.tensor([[0.0, 0.5]])


@pytest.mark.parametrize(
    "make",
    [
        lambda: tw.endpoint_weights(HALF, ONE, Endpoints(0, 1), temperature=0.0),
        lambda: tw.endpoint_weights(HALF, ONE, Endpoints(0, 1), temperature=-1.0),
        lambda: tw.endpoint_weights(HALF, ONE, Endpoints(0, 1), temperature=math.inf),
        lambda: tw.endpoint_weights(HALF, ONE, Endpoints(0, 1), form="literal", eps=0.0),
        lambda: tw.endpoint_weights(HALF, ONE, Endpoints(0, 1), form="literal", eps=math.nan),
        lambda: tw.softmax_partition(HALF, ONE, tw.score_extrema(HALF, ONE), temperature=0.0),
        lambda: tw.softmax_partition(HALF * math.nan, ONE, tw.score_extrema(HALF, ONE)),
        lambda: Endpoints(1e300, 0.0),
        lambda: tw.match_mass(HALF, ONE, count=-3.0, mass=1.0),
        lambda: tw.endpoint_weights(HALF * math.nan, ONE, Endpoints(0, 1)),
        lambda: tw.endpoint_weights(
            HALF,
            ONE,
            Endpoints(0, 1),
            extrema=ScoreExtrema(torch.tensor(0.1), torch.tensor(1.0)),
        ),
        lambda: tw.match_mass(-HALF, ONE),
        lambda: tw.match_mass(HALF, ONE, target=-1.0),
        lambda: tw.match_mass(HALF, ONE, count=10**400),
        lambda: tw.endpoint_weights(
            HALF, ONE, Endpoints(0, 1), form="literal", partition=torch.tensor(math.nan)
        ),
        lambda: tw.weight_statistics(-HALF, ONE),
        lambda: tw.weight_statistics(HALF, ONE, bin_count=0),
        lambda: tw.weight_statistics(HALF, ONE, bins=torch.zeros(1, 2).long(), bin_count=2**70),
        lambda: tw.weight_statistics(HALF, ONE, bins=torch.tensor([[0, 3]]), bin_count=2),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(TokenWeightsError, match="expected"):
        make()
