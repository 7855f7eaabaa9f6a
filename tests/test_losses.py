import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import scored_masks

import tokenweights as tw
from tokenweights import TokenWeightsError

DENOMINATORS = ["all_tokens", "selected_tokens", "weight_sum"]


def weights_of(scores):
    """Some zero, some not; NaN where the scores are."""
    return torch.where(scores > 0.3, scores, scores * 0)


def test_equations_3_7_17_24_25_by_hand():
    token_loss = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    weights = torch.tensor([[0.0, 0.5, 0.0, 1.0]])
    values = {
        name: tw.weighted_token_mean(token_loss, mask, weights, denominator=name).item()
        for name in DENOMINATORS
    }
    assert values == {
        "all_tokens": 5.0 / 4,  # Eq. 7, 25
        "selected_tokens": 5.0 / 2,  # Eq. 24
        "weight_sum": pytest.approx(5.0 / 1.5),  # Eq. 3, 17
    }
    assert tw.weighted_token_mean(token_loss, mask).item() == 2.5  # Eq. 1


@pytest.mark.parametrize("denominator", DENOMINATORS)
@given(case=scored_masks(), seed=st.integers(0, 1000))
def test_micro_batches_sum_to_the_batch(denominator, case, seed):
    scores, mask = case
    weights = weights_of(scores)
    token_loss = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)).double()
    token_loss = torch.where(mask, token_loss, torch.nan).requires_grad_()
    whole = tw.weighted_token_mean(token_loss, mask, weights, denominator=denominator)
    count = tw.loss_denominator(mask, weights, denominator=denominator)
    parts = [
        tw.weighted_token_mean(
            token_loss[r : r + 1], mask[r : r + 1], weights[r : r + 1], count=count
        )
        for r in range(mask.shape[0])
    ]
    torch.testing.assert_close(sum(parts, whole * 0), whole)
    (gradient,) = torch.autograd.grad(whole, token_loss)
    expected = torch.where(mask, weights, 0.0) / count.clamp(min=1e-300)
    torch.testing.assert_close(gradient, expected)


def test_an_empty_batch_has_loss_zero_and_zero_gradients():
    token_loss = torch.tensor([[math.nan, 1.0]], requires_grad=True)
    mask = torch.zeros(1, 2, dtype=torch.bool)
    for denominator in DENOMINATORS:
        loss = tw.weighted_token_mean(token_loss, mask, torch.ones(1, 2), denominator=denominator)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, token_loss)
        assert gradient.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 2.0, 20.0])
def test_clipped_surrogate_by_hand(ratio, advantage):
    log_probs = torch.tensor([[math.log(ratio)]])
    zeros, advantages = torch.zeros(1, 1), torch.tensor([[advantage]])
    clipped = min(max(ratio, 0.8), 1.28)
    expected = -min(ratio * advantage, clipped * advantage)
    loss = tw.clipped_surrogate_loss(log_probs, zeros, advantages)
    assert loss.item() == pytest.approx(expected)
    bounded = tw.clipped_surrogate_loss(log_probs, zeros, advantages, dual_clip=10.0)
    assert bounded.item() == pytest.approx(min(expected, 15.0) if advantage < 0 else expected)


@given(scored_masks())
def test_weights_on_advantages_or_on_losses_are_the_same(case):
    scores, mask = case
    weights = torch.where(mask, weights_of(scores), 0.0)
    log_probs = torch.where(mask, scores - 0.5, 0.0)
    advantages = torch.linspace(-1, 1, mask.shape[0], dtype=torch.float64)[:, None]
    inside = tw.clipped_surrogate_loss(log_probs, log_probs * 0, advantages * weights)
    outside = tw.clipped_surrogate_loss(log_probs, log_probs * 0, advantages.expand_as(mask) + 0)
    torch.testing.assert_close(inside, outside * weights)


def test_masked_nan_reaches_neither_loss_nor_gradient():
    log_probs = torch.tensor([[-1.0, math.nan]], requires_grad=True)
    old = torch.tensor([[-1.0, -math.inf]])
    mask = torch.tensor([[True, False]])
    loss = tw.clipped_surrogate_loss(log_probs, old, torch.tensor([[2.0]]), mask=mask)
    assert loss.tolist() == [[-2.0, 0.0]]
    (gradient,) = torch.autograd.grad(tw.weighted_token_mean(loss, mask), log_probs)
    assert gradient.tolist() == [[-2.0, 0.0]]


@pytest.mark.parametrize("denominator", DENOMINATORS)
@given(case=scored_masks())
def test_aggregation_modes_agree_with_numpy(denominator, case):
    scores, mask = case
    weights, token_loss = weights_of(scores), torch.where(mask, scores * 3 - 1, torch.nan)
    rows = [
        (token_loss[r][mask[r]].numpy(), weights[r][mask[r]].numpy())
        for r in range(mask.shape[0])
        if mask[r].any()
    ]
    bottom = {
        "all_tokens": lambda w: w.size,
        "selected_tokens": lambda w: (w > 0).sum(),
        "weight_sum": lambda w: w.sum(),
    }[denominator]
    means = [(loss * w).sum() / bottom(w) if bottom(w) > 0 else 0.0 for loss, w in rows]
    got = tw.aggregate_loss(
        token_loss, mask, weights, mode="seq-mean-token-mean", denominator=denominator
    )
    assert got.item() == pytest.approx(np.mean(means) if means else 0.0)
    if denominator == "all_tokens":
        sums = np.mean([(loss * w).sum() for loss, w in rows]) if rows else 0.0
        got = tw.aggregate_loss(token_loss, mask, weights, mode="seq-mean-token-sum")
        assert got.item() == pytest.approx(sums)
        normed = tw.aggregate_loss(
            token_loss, mask, weights, mode="seq-mean-token-sum-norm", max_length=8
        )
        assert normed.item() == pytest.approx(sums / 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adds_up_in_float32(dtype):
    token_loss = torch.full((10, 7000), 0.5, dtype=dtype, requires_grad=True)
    mask = torch.ones(10, 7000, dtype=torch.bool)
    loss = tw.weighted_token_mean(token_loss, mask, torch.ones(10, 7000))
    assert loss.dtype == torch.float32 and loss.item() == 0.5
    (gradient,) = torch.autograd.grad(loss, token_loss)
    assert gradient.float().mean().item() == pytest.approx(1 / 70000, rel=0.01)
    assert tw.masked_mean(token_loss, mask).item() == 0.5
    assert tw.aggregate_loss(token_loss, mask, mode="seq-mean-token-mean").item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_sums_of_half_precision_weights_do_not_overflow(dtype, mode):
    ones = torch.ones(1, 4096, dtype=dtype)
    weights = ones * 100
    loss = tw.aggregate_loss(ones, ones.bool(), weights, mode=mode, denominator="weight_sum")
    assert loss.item() == 1.0
    product = tw.aggregate_loss(weights * 10, ones.bool(), weights, mode=mode)
    assert product.item() == 1e5  # more than float16 holds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("advantage", [-1.5, 0.0, 1.5])
def test_ratios_of_half_precision_do_not_overflow(dtype, advantage):
    log_probs = torch.tensor([[-1.0, -1.0, 11.0]], dtype=dtype, requires_grad=True)
    old = torch.tensor([[-1.0, 11.0, -1.0]], dtype=dtype)
    advantages = torch.tensor([[advantage]], dtype=dtype)
    loss = tw.clipped_surrogate_loss(log_probs, old, advantages)
    ratios = [1.0, math.exp(-12), math.exp(12)]
    expected = [-min(r * advantage, min(max(r, 0.8), 1.28) * advantage) for r in ratios]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([expected]))
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert not gradient.isnan().any()


@pytest.mark.parametrize("size", [1e-40, 1e-45, 1e-200, 1e-320])
def test_a_mean_by_tiny_weights_is_that_by_large_ones(size):
    """Down to the denormal numbers; the weights are whole multiples of the smallest."""
    unit = torch.tensor(size, dtype=torch.float32 if size > 1e-46 else torch.float64)
    weights = unit * torch.tensor([[1.0, 2.0, 5.0]], dtype=unit.dtype)
    token_loss, mask = torch.tensor([[0.3, -0.7, 0.9]]), torch.ones(1, 3, dtype=torch.bool)
    expected = (0.3 * 1 - 0.7 * 2 + 0.9 * 5) / 8
    for mode in ("token-mean", "seq-mean-token-mean"):
        loss = tw.aggregate_loss(token_loss, mask, weights, mode=mode, denominator="weight_sum")
        assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [torch.tensor(4), torch.tensor(4, dtype=torch.int16), 4, 4.0])
def test_counts_may_be_integers(count):
    token_loss, mask = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert tw.weighted_token_mean(token_loss, mask, count=count).item() == 1.0
    assert tw.aggregate_loss(token_loss, mask, mode="seq-mean-token-sum", count=count).item() == 1.0


def test_any_count_that_a_float_holds_is_right():
    token_loss, mask = torch.tensor([[1.0, 3.0]]).double(), torch.ones(1, 2, dtype=torch.bool)
    assert tw.weighted_token_mean(token_loss, mask, count=2**70).item() == 4 / 2**70
    assert tw.weighted_token_mean(token_loss, mask, count=0.1).item() == 4 / 0.1


def test_a_large_ratio_does_not_turn_weight_zero_into_nan():
    log_probs = torch.tensor([[100.0]], requires_grad=True)
    loss = tw.clipped_surrogate_loss(log_probs, torch.zeros(1, 1), torch.zeros(1, 1))
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert loss.item() == 0 and gradient.item() == 0


def test_weights_off_the_mask_do_not_count_as_selected():
    mask = torch.tensor([[True, False]])
    count = tw.loss_denominator(mask, torch.ones(1, 2), denominator="selected_tokens")
    assert count.item() == 1


def test_losses_compile_in_one_graph():
    torch.compiler.reset()
    mask, token_loss = torch.tensor([[True, True, False]]), torch.tensor([[1.0, 2.0, 4.0]])
    compiled = torch.compile(tw.weighted_token_mean, backend="eager", fullgraph=True)
    assert compiled(token_loss, mask, torch.ones(1, 3)).item() == 1.5


ONE = torch.ones(1, 2, dtype=torch.bool)
LOSS = torch.rand(1, 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tw.clipped_surrogate_loss(LOSS, LOSS, LOSS, clip_low=-0.1),
        lambda: tw.clipped_surrogate_loss(LOSS, LOSS, LOSS, clip_low=1.1),
        lambda: tw.clipped_surrogate_loss(LOSS, LOSS, LOSS, dual_clip=1.0),
        lambda: tw.aggregate_loss(LOSS, ONE, mode="seq-mean-token-sum-norm"),
        lambda: tw.aggregate_loss(LOSS, ONE, mode="seq-mean-token-sum", max_length=3),
        lambda: tw.aggregate_loss(LOSS, ONE, mode="seq-mean-token-sum-norm", max_length=0),
        lambda: tw.aggregate_loss(LOSS, ONE, mode="seq-mean-token-sum-norm", max_length=2**70),
        lambda: tw.aggregate_loss(LOSS, ONE, max_length=5),
        lambda: tw.aggregate_loss(LOSS, ONE, -LOSS),
        lambda: tw.aggregate_loss(LOSS, ONE, mode="seq-mean-token-sum", count=math.nan),
        lambda: tw.weighted_token_mean(LOSS, ONE, -LOSS, denominator="weight_sum"),
        lambda: tw.weighted_token_mean(LOSS, ONE, count=math.nan),
        lambda: tw.weighted_token_mean(LOSS, ONE, count=-3.0),
        lambda: tw.weighted_token_mean(LOSS, ONE, count=10**400),
        lambda: tw.weighted_token_mean(LOSS, ONE, count=-(10**400)),
        lambda: tw.aggregate_loss(LOSS, ONE, mode="seq-mean-token-sum", denominator="weight_sum"),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(TokenWeightsError, match="expected"):
        make()


def surrogates(log_probs, old, advantages, **options):
    log_probs = log_probs.clone().requires_grad_()
    loss = tw.clipped_surrogate_loss(log_probs, old, advantages, **options)
    return loss, torch.autograd.grad(loss.nansum(), log_probs)[0]


@given(scored_masks(), st.floats(0, 1), st.floats(0, 2))
def test_clip_bounds_of_tokens_are_those_of_one_token_each(case, low, high):
    scores, mask = case
    old, advantages = scores.nan_to_num() - 0.6, scores.nan_to_num() * 4 - 2
    log_probs = advantages.flip(-1) / 2
    plain = surrogates(log_probs, old, advantages, clip_low=low, clip_high=high, mask=mask)
    lows, highs = (torch.full_like(old, end).where(mask, math.nan) for end in (low, high))
    for bounds in (
        {"clip_low": lows},
        {"clip_high": highs},
        {"clip_low": lows, "clip_high": highs},
    ):
        options = {"clip_low": low, "clip_high": high} | bounds
        found = surrogates(log_probs, old, advantages, **options, mask=mask)
        assert all(map(torch.equal, found, plain))
    column = torch.full((len(mask), 1), low, dtype=old.dtype)
    options = {"clip_low": column, "clip_high": high, "mask": mask}
    assert torch.equal(surrogates(log_probs, old, advantages, **options)[0], plain[0])


@given(scored_masks(), st.integers(0, 1000), st.sampled_from([None, 1.5]))
def test_clip_bounds_of_tokens_agree_with_numpy(case, seed, dual_clip):
    """Values, and gradients by hand: the ratio times the advantage, or 0 for a clipped token."""
    scores, mask = case
    generator = torch.Generator().manual_seed(seed)
    old, new, low, high = torch.rand((4, *mask.shape), generator=generator, dtype=torch.float64)
    advantages = scores * 4 - 2
    bounds = [torch.where(mask, end, math.nan).requires_grad_() for end in (low, high)]
    options = {"clip_low": bounds[0], "clip_high": bounds[1], "dual_clip": dual_clip, "mask": mask}
    loss, gradient = surrogates(new * 3, old * 3, advantages, **options)
    r, a = np.exp(3 * (new - old).numpy()), torch.where(mask, advantages, 0.0).numpy()
    clipped = np.clip(r, 1 - low.numpy(), 1 + high.numpy())
    values, slopes = -np.minimum(r * a, clipped * a), np.where(r * a <= clipped * a, -r * a, 0)
    if dual_clip is not None:
        slopes = np.where((a < 0) & (values > -dual_clip * a), 0, slopes)
        values = np.where(a < 0, np.minimum(values, -dual_clip * a), values)
    torch.testing.assert_close(loss.detach(), torch.where(mask, torch.tensor(values), 0.0))
    torch.testing.assert_close(gradient, torch.where(mask, torch.tensor(slopes), 0.0))


def test_clip_bounds_carry_no_gradient():
    new = torch.tensor([[1.5, 0.1]]).log().requires_grad_()
    bound = torch.full((1, 2), 0.2, requires_grad=True)
    options = {"clip_low": bound, "clip_high": bound}
    loss = tw.clipped_surrogate_loss(new, torch.zeros(1, 2), torch.tensor([[1.0]]), **options)
    assert torch.autograd.grad(loss.sum(), bound, allow_unused=True) == (None,)


def test_gradients_under_bounds_of_tokens_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    old, low, high = torch.rand((3, 3, 4), generator=generator, dtype=torch.float64)
    new = (old + torch.tensor([-0.9, -0.05, 0.05, 0.9])).double().requires_grad_()  # no kink near
    mask = torch.arange(4) < torch.tensor([[4], [3], [0]])
    advantages = torch.tensor([[1.5], [-1.5], [1.0]], dtype=torch.float64)
    gate = torch.rand((3, 4), generator=generator) < 0.5

    def gated(new):
        loss = tw.clipped_surrogate_loss(
            new, old, advantages, clip_low=low, clip_high=high, mask=mask
        )
        kept = tw.gated_loss(loss, mask, gate, mode="drop")
        return tw.weighted_token_mean(kept.token_loss, kept.mask)

    assert torch.autograd.gradcheck(gated, new)


def test_each_token_is_clipped_at_its_own_bound():
    new, old = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log(), torch.zeros(1, 4)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    bounds = torch.tensor([[0.2, 0.6, 0.2, 0.6]])
    loss, gradient = surrogates(new, old, advantages, clip_low=bounds, clip_high=bounds)
    torch.testing.assert_close(loss, torch.tensor([[-1.2, -1.5, 0.8, 0.5]]))
    assert (gradient != 0).tolist() == [[False, True, False, True]]


def test_without_bounds_nothing_is_clipped():
    new, old = torch.tensor([[3.0, -3.0]]), torch.zeros(1, 2)
    advantages = torch.tensor([[2.0, -2.0]])
    loss, _ = surrogates(new, old, advantages, clip_low=1.0, clip_high=math.inf)
    torch.testing.assert_close(loss, -new.exp() * advantages)
    never = torch.full((1, 2), math.inf)
    options = {"clip_low": torch.ones(1, 2), "clip_high": never}
    loss, gradient = surrogates(new, old, advantages, **options)
    torch.testing.assert_close(loss, -new.exp() * advantages)
    torch.testing.assert_close(gradient, -new.exp() * advantages)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"clip_low": torch.tensor([[0.2, 1.5]])}, "`clip_low` in [0, 1], got 1.5"),
        ({"clip_high": torch.tensor([[0.2, -0.5]])}, "`clip_high` in [0, inf], got -0.5"),
        ({"clip_high": torch.tensor([[0.2, math.nan]])}, "got nan"),
        ({"clip_low": torch.tensor([0.2, 0.2])}, "`clip_low`"),
    ],
)
def test_clip_bounds_out_of_range_are_refused(bounds, words):
    with pytest.raises(TokenWeightsError) as error:
        tw.clipped_surrogate_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), **bounds)
    assert words in str(error.value)


MODES = ["drop", "detach", "soft"]


@given(scored_masks(), st.sampled_from(MODES))
def test_gates_have_the_values_and_gradients_that_they_say(case, mode):
    scores, mask = case
    token_loss = torch.where(mask, scores - 0.4, math.nan).requires_grad_()
    gate = scores > 0.5
    kept = tw.gated_loss(token_loss, mask, gate, mode=mode)
    loss = tw.weighted_token_mean(kept.token_loss, kept.mask)
    (gradient,) = torch.autograd.grad(loss, token_loss)
    values = np.where(mask, scores.nan_to_num() - 0.4, 0)
    counted = (mask & gate) if mode == "drop" else mask
    count = max(int(counted.sum()), 1)
    expected = (values * np.asarray(counted)).sum() / count
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert gradient.numpy() == pytest.approx(np.asarray(mask & gate) / count)


@given(scored_masks())
def test_a_soft_gate_is_a_stopped_part_beside_a_moving_one(case):
    gate, mask = case
    token_loss = torch.where(mask, 1.5 - gate * 4, math.nan).requires_grad_()
    kept = tw.gated_loss(token_loss, mask, gate * 3, mode="soft")
    loss = tw.weighted_token_mean(kept.token_loss.square(), kept.mask)
    valid = torch.where(mask, token_loss, 0.0)
    share = torch.where(mask, gate * 3, 0.0)
    reference = share * valid + (1 - share) * valid.detach()
    reference = reference.square().sum() / max(int(mask.sum()), 1)
    torch.testing.assert_close(loss, reference)
    expected, got = (torch.autograd.grad(value, token_loss)[0] for value in (reference, loss))
    torch.testing.assert_close(got, expected)


def test_a_soft_gate_scales_gradients_and_keeps_values():
    token_loss = torch.tensor([[1.0, 2.0, 1e30, -0.0]], requires_grad=True)
    mask = torch.ones(1, 4, dtype=torch.bool)
    gate = torch.tensor([[0.25, 3.0, 0.0, 1.0]], requires_grad=True)
    kept = tw.gated_loss(token_loss, mask, gate, mode="soft")
    assert torch.equal(kept.token_loss.view(torch.int32), token_loss.view(torch.int32))
    assert torch.equal(kept.mask, mask)
    gradients = torch.autograd.grad(kept.token_loss.sum(), (token_loss, gate), allow_unused=True)
    assert torch.equal(gradients[0], gate) and gradients[1] is None


def test_a_gate_may_be_more_than_half_precision_holds():
    token_loss = torch.ones(1, 1, dtype=torch.float16, requires_grad=True)
    kept = tw.gated_loss(token_loss, ONE[:, :1], torch.tensor([[1e5]]), mode="soft")
    assert kept.token_loss.dtype == torch.float16
    (gradient,) = torch.autograd.grad((kept.token_loss * 2**-10).sum(), token_loss)
    assert gradient.item() == pytest.approx(1e5 / 2**10, rel=1e-3)


@given(scored_masks(), st.floats(0.1, 1))
def test_clipped_tokens_keep_the_published_share_of_their_gradient(case, share):
    """CE-GPPO, arXiv 2509.20712: its expression beside a soft gate of the unclipped loss."""
    scores, mask = case
    scores = torch.where(mask, scores, 0.7)  # the published expression knows no mask
    new = (scores * 2 - 1).requires_grad_()
    advantages = scores.flip(-1) - 0.5
    ratio = new.exp()
    fixed = ratio.detach()
    low, high = (advantages < 0) & (fixed < 0.8), (advantages > 0) & (fixed > 1.2)
    published = torch.where(low, share * 0.8 / fixed * ratio, ratio)
    published = torch.where(high, 1.2 / fixed * ratio, published) * -advantages
    (expected,) = torch.autograd.grad(torch.where(mask, published, 0.0).sum(), new)

    options = {"clip_low": 1.0, "clip_high": math.inf, "mask": mask}
    token_loss = tw.clipped_surrogate_loss(new, torch.zeros_like(new), advantages, **options)
    gate = torch.where(low, share * 0.8 / fixed, torch.where(high, 1.2 / fixed, 1.0))
    kept = tw.gated_loss(token_loss, mask, gate, mode="soft")
    (gradient,) = torch.autograd.grad(kept.token_loss.sum(), new)
    torch.testing.assert_close(gradient, expected)


def test_the_policy_learns_where_its_own_log_probs_are_passed_as_the_old_ones():
    """On the first pass over a batch the ratio is 1, and its gradient that of REINFORCE."""
    log_probs = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.5, -0.5, 0.0]], dtype=torch.float64)
    for mask in (None, torch.tensor([[True, True, False]])):
        loss = tw.clipped_surrogate_loss(log_probs, log_probs, advantages, mask=mask)
        (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
        assert torch.equal(loss.detach(), -advantages) and torch.equal(gradient, -advantages)


LOSSES = {
    **{
        f"{mode} by {denominator}": functools.partial(
            tw.aggregate_loss, mode=mode, denominator=denominator
        )
        for mode in ("token-mean", "seq-mean-token-mean")
        for denominator in DENOMINATORS
    },
    "seq-mean-token-sum": functools.partial(tw.aggregate_loss, mode="seq-mean-token-sum"),
    "seq-mean-token-sum-norm": functools.partial(
        tw.aggregate_loss, mode="seq-mean-token-sum-norm", max_length=6
    ),
    "count": lambda loss, mask, weights: tw.weighted_token_mean(
        loss, mask, weights, count=weights.sum()
    ),
    "matched": lambda loss, mask, weights: tw.weighted_token_mean(
        loss, mask, tw.match_mass(weights, mask)
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_differences_by_the_log_probs_alone(name):
    generator = torch.Generator().manual_seed(0)
    new, old, advantages, weights = torch.rand((4, 3, 4), generator=generator, dtype=torch.float64)
    new = (old + torch.tensor([-0.9, -0.05, 0.05, 0.9])).double()  # no kink near
    mask = torch.arange(4) < torch.tensor([[4], [3], [0]])

    def loss(new, old=old, advantages=advantages, weights=weights):
        token_loss = tw.clipped_surrogate_loss(new, old, advantages, mask=mask)
        return LOSSES[name](token_loss, mask, weights)

    assert torch.autograd.gradcheck(loss, new.requires_grad_())
    constants = [each.clone().requires_grad_() for each in (old, advantages, weights)]
    whole = loss(new, *constants)
    expected = torch.autograd.grad(loss(new), new)[0]
    found, *none = torch.autograd.grad(whole, (new, *constants), allow_unused=True)
    assert torch.equal(found, expected) and none == [None] * 3


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("mode", MODES)
def test_gated_micro_batches_sum_to_the_batch(mode, aggregation):
    generator = torch.Generator().manual_seed(0)
    shape, rows = (5, 7), (slice(0, 1), slice(1, 4), slice(4, 5))
    token_loss = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.rand(shape, generator=generator) < 0.8
    gate = torch.rand(shape, generator=generator) < 0.5
    gate[2] = False  # a response that "drop" empties
    gate = torch.rand(shape, generator=generator) * gate if mode == "soft" else gate
    kept = tw.gated_loss(token_loss, mask, gate, mode=mode)
    whole = tw.aggregate_loss(kept.token_loss, kept.mask, mode=aggregation)
    of_tokens = aggregation == "token-mean"
    count = tw.loss_denominator(kept.mask) if of_tokens else kept.mask.any(-1).sum()
    parts = [tw.gated_loss(token_loss[r], mask[r], gate[r], mode=mode) for r in rows]
    total = torch.stack(
        [
            tw.aggregate_loss(part.token_loss, part.mask, mode=aggregation, count=count)
            for part in parts
        ]
    ).sum()
    torch.testing.assert_close(total, whole)
    expected, got = (torch.autograd.grad(value, token_loss)[0] for value in (whole, total))
    torch.testing.assert_close(got, expected)
    assert not got[~kept.mask].any()


@pytest.mark.parametrize("mode", MODES)
def test_gates_compile_in_one_graph(mode):
    torch.compiler.reset()
    token_loss = torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
    mask, gate = torch.tensor([[True, True, False]]), torch.tensor([[True, False, True]])

    def mean(token_loss):
        kept = tw.gated_loss(token_loss, mask, gate, mode=mode)
        return tw.weighted_token_mean(kept.token_loss, kept.mask)

    loss = torch.compile(mean, backend="eager", fullgraph=True)(token_loss)
    assert loss.item() == (1.0 if mode == "drop" else 1.5)
    (gradient,) = torch.autograd.grad(loss, token_loss)
    assert gradient.tolist() == [[1.0 if mode == "drop" else 0.5, 0.0, 0.0]]


def test_gates_that_do_not_fit_are_refused():
    ones = torch.ones(1, 2)
    with pytest.raises(TokenWeightsError, match="of booleans with the mode 'drop'"):
        tw.gated_loss(ones, ones.bool(), ones)
    with pytest.raises(TokenWeightsError, match="`gate` >= 0"):
        tw.gated_loss(ones, ones.bool(), -ones, mode="soft")
    with pytest.raises(TokenWeightsError, match="finite"):
        tw.gated_loss(ones, ones.bool(), ones * math.nan, mode="soft")
