import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from strategies import FLOATS, score_stacks

import tokenweights as tw
from tokenweights import TokenWeightsError

LOG2 = math.log(2)
ALL = torch.ones(1, 2, dtype=torch.bool)
HALF = (torch.float16, torch.bfloat16)


def close(actual, expected):
    assert actual.dtype == torch.float32 and not actual.requires_grad
    np.testing.assert_allclose(actual.numpy(), expected, rtol=2e-6, atol=1e-7)


def test_signals_by_hand():
    log_probs, other = torch.tensor([[-LOG2, 0.0]]), torch.tensor([[-2 * LOG2, 0.0]])
    entropy, advantages = torch.tensor([[2 * LOG2, 0.5]]), torch.tensor([[-3.0]])
    close(tw.surprisal(log_probs), [[LOG2, 0.0]])
    close(tw.sampled_probability(log_probs), [[0.5, 1.0]])
    close(tw.relative_surprisal(log_probs, entropy, ALL), [[0.5, 0.0]])
    close(tw.importance_ratio(log_probs, other), [[2.0, 1.0]])
    close(tw.reference_divergence(log_probs, other), [[0.5 - 1 + LOG2, 0.0]])
    close(tw.log_perplexity(log_probs, ALL), [[LOG2 / 2, LOG2 / 2]])
    close(tw.entropy_sensitivity(log_probs, entropy, advantages), [[1.5 * LOG2, 0.0]])
    # Means 0 and -LOG2 / 2.
    signed = torch.tensor([[1.0, -1.0]])
    close(tw.advantage_covariance(log_probs, signed, ALL), [[-LOG2 / 2, -LOG2 / 2]])
    close(tw.advantage_covariance(log_probs, advantages, ALL), [[0.0, 0.0]])


@given(score_stacks(3, dtypes=FLOATS), st.booleans())
def test_signals_agree_with_numpy(case, per_response):
    stack, mask = case
    log_probs, other, third = -8 * stack[0], -8 * stack[1], stack[2]
    advantages = torch.where(mask, third, 0.5)[:, :1] if per_response else third
    n = mask.numpy()
    own, q, h = (each.double().numpy() for each in (log_probs, other, third))
    a = np.broadcast_to(advantages.double().numpy(), own.shape)
    with np.errstate(all="ignore"):
        found = {
            "surprisal": (tw.surprisal(log_probs), -own),
            "probability": (tw.sampled_probability(log_probs), np.exp(own)),
            "relative": (
                tw.relative_surprisal(log_probs, third, mask),
                -own / np.maximum(h, 1e-6),
            ),
            "ratio": (tw.importance_ratio(log_probs, other, mask), np.exp(own - q)),
            "divergence": (
                tw.reference_divergence(log_probs, other),
                np.expm1(q - own) - (q - own),
            ),
            "sensitivity": (
                tw.entropy_sensitivity(log_probs, third, advantages),
                np.abs(a) * (1 - np.exp(own)) * np.abs(own + h),
            ),
            "covariance": (
                tw.advantage_covariance(log_probs, advantages, mask),
                (a - a[n].mean()) * (own - own[n].mean()) if n.any() else a,
            ),
        }
        lengths = np.maximum(n.sum(-1, keepdims=True), 1)
        means = np.where(n, -own, 0).sum(-1, keepdims=True) / lengths
        found["perplexity"] = tw.log_perplexity(log_probs, mask), np.broadcast_to(means, own.shape)
    for name, (actual, expected) in found.items():
        assert actual.dtype == torch.float32, name
        actual = actual.numpy()
        # Float32 inputs are subtracted in float32: half a unit of numbers up to 8.
        np.testing.assert_allclose(actual[n], expected[n], rtol=5e-6, atol=2e-6, err_msg=name)
        if name in ("relative", "ratio", "covariance", "perplexity"):
            assert (actual[~n] == 0).all(), name
        if name != "covariance":
            assert (actual[n] >= 0).all(), name


@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-4, 0.0299, 0.0301, 1.0, 30.0])
def test_small_divergences_keep_their_digits(size):
    for apart in (size, -size):
        log_probs = torch.tensor([[0.0]], dtype=torch.float64)
        divergence = tw.reference_divergence(log_probs, log_probs + apart).item()
        terms = [apart**k / math.factorial(k) for k in range(120, 1, -1)]
        expected = math.fsum(terms) if abs(apart) < 5 else math.expm1(apart) - apart
        assert divergence == pytest.approx(expected, rel=1e-6)
    close = torch.tensor([[-1e-4]])  # and of float32 inputs: expm1(d) - d would keep three digits
    divergence = tw.reference_divergence(torch.zeros(1, 1), close).item()
    assert divergence == pytest.approx(float(close) ** 2 / 2, rel=4e-5)


def test_log_probs_above_zero_count_as_zero():
    above = torch.tensor([[1e-6, 0.0]])
    assert tw.surprisal(above).tolist() == [[0.0, 0.0]]
    assert not tw.surprisal(above).signbit().any()
    assert tw.sampled_probability(above).tolist() == [[1.0, 1.0]]
    assert tw.log_perplexity(above, ALL).tolist() == [[0.0, 0.0]]
    assert tw.entropy_sensitivity(above, ALL.float(), ALL.float()).tolist() == [[0.0, 0.0]]


def test_ratios_stay_finite():
    log_probs = torch.tensor([[-500.0, -1e38]])
    zero, everything = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for ratio in (tw.importance_ratio(log_probs, zero), tw.importance_ratio(zero, log_probs)):
        assert ratio.isfinite().all() and (ratio > 0).all()
    for pair in ((log_probs, zero), (zero, log_probs)):
        assert tw.reference_divergence(*pair).isfinite().all()
    relative = tw.relative_surprisal(log_probs, zero, everything)
    assert relative.isfinite().all() and relative[0, 0] == pytest.approx(5e8)
    assert tw.relative_surprisal(zero, zero, everything).tolist() == [[0.0, 0.0]]
    # An entropy that rounding put below 0 is as good as 0.
    assert tw.relative_surprisal(zero, zero - 1e-7, everything).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_covariances_of_numbers_far_from_zero(offset):
    generator = torch.Generator().manual_seed(2)
    log_probs, advantages = torch.randn(2, 20, 30, generator=generator, dtype=torch.float64)
    mask = torch.rand(20, 30, generator=generator) < 0.7
    found = tw.advantage_covariance(log_probs - offset, advantages + offset, mask)
    n = mask.numpy()
    expected = np.cov(log_probs.numpy()[n], advantages.numpy()[n], bias=True)[0, 1]
    assert found.double().sum().item() / n.sum() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_adds_up_in_full(dtype):
    log_probs = torch.full((1, 70000), -2.0, dtype=dtype)
    mask = torch.ones(1, 70000, dtype=torch.bool)
    assert (tw.log_perplexity(log_probs, mask) == 2).all()
    assert (tw.advantage_covariance(log_probs, log_probs, mask) == 0).all()


def test_a_response_without_a_token_has_no_perplexity():
    log_probs = torch.tensor([[math.nan, -math.inf], [math.nan, -3.0]])
    mask = torch.tensor([[False, False], [False, True]])
    assert tw.log_perplexity(log_probs, mask).tolist() == [[0.0, 0.0], [0.0, 3.0]]
    assert tw.log_perplexity(torch.zeros(2, 0), torch.zeros(2, 0).bool()).shape == (2, 0)


ROWS = {
    1: [range(0, 5)],
    2: [range(0, 4), range(4, 5)],
    4: [range(0, 2), range(2, 2), range(2, 3), range(3, 5)],
}


def covariances(rows, group):
    generator = torch.Generator().manual_seed(3)
    log_probs, advantages = torch.randn(2, 5, 8, generator=generator)
    mask = torch.rand(5, 8, generator=generator) < 0.6
    mask[2] = False
    given = (each[list(rows)] for each in (log_probs.masked_fill(~mask, math.nan), advantages))
    return tw.advantage_covariance(*given, mask[list(rows)], group=group)


def covariances_on(rank, size):
    return covariances(ROWS[size][rank], dist.group.WORLD)


@pytest.mark.parametrize("size", ROWS)
def test_covariances_on_ranks_are_those_of_the_whole_batch(size):
    with Ranks(size) as ranks:
        joined = torch.cat(ranks(covariances_on))
    torch.testing.assert_close(joined, covariances(range(5), None), rtol=1e-6, atol=1e-7)


NAN = torch.full((1, 2), math.nan)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tw.relative_surprisal(NAN, ALL.float(), ALL),
        lambda: tw.relative_surprisal(ALL.float(), NAN, ALL),
        lambda: tw.advantage_covariance(NAN, ALL.float(), ALL),
        lambda: tw.advantage_covariance(ALL.float(), NAN[:, :1], ALL),
        lambda: tw.log_perplexity(NAN, ALL),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(TokenWeightsError, match="finite under a True mask"):
        make()
