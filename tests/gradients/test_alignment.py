"""Every token's inner product with the full gradient, against per-token Jacobians."""

import random

import pytest
import torch
from gradients import tiny_policy
from torch import nn

import tokenweights as tw
from tokenweights import TokenWeightsError


def aligned(batch, model, **options):
    return tw.token_alignment(lambda: batch.loss(model), model, mask=batch.mask, **options)


def exact_inner(batch, keep=None):
    model = tiny_policy.policy()
    rows = tiny_policy.jacobian(model, batch)
    if keep is not None:
        kept = [torch.full((p.numel(),), keep(name)) for name, p in model.named_parameters()]
        rows = rows[:, torch.cat(kept)]
    full = rows.mean(0)
    return rows @ full, float(full @ full)


def relative_error(inner, mask, expected):
    assert (inner[~mask] == 0).all()
    return float((inner[mask] - expected).norm() / expected.norm())


def test_closed_form():
    model = nn.Linear(2, 1, bias=False)
    inputs = torch.tensor([[[1.0, 0.0], [1.0, 2.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False]])
    for method in ("forward", "differences"):
        alignment = tw.token_alignment(
            lambda: model(inputs)[..., 0], model, mask=mask, method=method
        )
        torch.testing.assert_close(
            alignment.inner, torch.tensor([[1.0, 3.0, 0.0]]).double(), rtol=1e-3, atol=0
        )
        assert alignment.full_squared_norm == 2 and alignment.count == 2
        torch.testing.assert_close(alignment.projection_ratio, alignment.inner / 4)


def test_forward_mode_agrees_with_jacobians():
    batch = tiny_policy.Batch()
    expected, square = exact_inner(batch)
    alignment = aligned(batch, tiny_policy.policy(), method="forward")
    assert relative_error(alignment.inner, batch.mask, expected) < 1e-6
    assert alignment.full_squared_norm == pytest.approx(square, rel=1e-12)
    assert alignment.sum_error < 1e-12


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    # The last step is too long for one pass: it needs the combination of two.
    "options",
    [{"tolerance": 1e-4}, {"tolerance": 2e-5}, {"step": 0.1}],
    ids=["default", "tighter", "combined"],
)
@pytest.mark.parametrize("order", range(4))
def test_float32_differences_agree_with_float64_jacobians(checkpointed, options, order):
    expected, _ = exact_inner(tiny_policy.Batch())
    batch = tiny_policy.Batch(dtype=torch.float32)
    # Another order of hidden units is the same function with other rounding, as another processor.
    model = tiny_policy.policy(torch.float32, checkpointed=checkpointed, order=order)
    alignment = aligned(batch, model, compare_steps=True, **options)
    error = relative_error(alignment.inner, batch.mask, expected)
    assert error < 1e-3 and 1e-12 < alignment.sum_error < options.get("tolerance", 1e-4)
    assert float(alignment.projection_ratio.sum()) == pytest.approx(1, abs=1e-9)
    assert error / 10 < alignment.step_error < 1e-3


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_step_follows_the_scale_of_the_loss(scale):
    expected, _ = exact_inner(tiny_policy.Batch())
    batch = tiny_policy.Batch(dtype=torch.float32)
    batch.advantages *= scale
    alignment = aligned(batch, tiny_policy.policy(torch.float32))
    assert relative_error(alignment.inner, batch.mask, expected * scale**2) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_that_is_far_too_long_is_mended_by_shorter_ones(dtype):
    batch = tiny_policy.Batch(dtype=dtype)
    expected, _ = exact_inner(tiny_policy.Batch())
    raw, mended = (
        aligned(batch, tiny_policy.policy(dtype), step=1.0, tolerance=tolerance)
        for tolerance in (0.9, 1e-4)
    )
    assert raw.step_error is None and raw.step == 1.0 and raw.sum_error > 0.03
    assert mended.step_error is not None and mended.step < 1.0 and mended.sum_error < 1e-4
    assert relative_error(mended.inner, batch.mask, expected) < 1e-3


def test_a_step_that_rounding_swallows_is_mended_by_longer_ones():
    """By hand: losses w x at w = 0, of which changes of w below 0.3 are rounded away."""
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    inputs = torch.tensor([[1.0, 2.0, 9.0]], dtype=torch.float64)
    model, mask = nn.ParameterList([weight]), torch.tensor([[True, True, False]])

    def loss():
        rounded = torch.where(weight.abs() > 0.3, weight, 0.0)
        return (weight + (rounded - weight).detach()) * inputs

    # The gradient is 3/2, so these steps first move w by 0.225 and by 0.00015.
    alignment = tw.token_alignment(loss, model, mask=mask, step=0.15)
    assert alignment.inner.tolist() == [[1.5, 3.0, 0.0]]
    assert (alignment.step, alignment.step_error) == (0.3, 0.0)
    with pytest.raises(TokenWeightsError, match="sum to one"):
        tw.token_alignment(loss, model, mask=mask, step=1e-4)
    assert weight.item() == 0


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (1e3, "sum to one"),
        (1e-30, "`step` that moves the parameters, got 1e-30"),
        *((step, "`step` finite and > 0") for step in (0.0, -1.0, float("inf"), float("nan"))),
    ],
)
def test_a_step_that_nothing_can_mend_is_refused(step, message):
    batch = tiny_policy.Batch(dtype=torch.float32)
    with pytest.raises(TokenWeightsError, match=message):
        aligned(batch, tiny_policy.policy(torch.float32), step=step)


def test_losses_of_size_zero_have_a_step():
    """Log-ratios are 0 at their own policy, and their gradients are not."""
    batch, model = tiny_policy.Batch(), tiny_policy.policy()
    start = batch.loss(model).detach()
    alignment = tw.token_alignment(lambda: batch.loss(model) - start, model, mask=batch.mask)
    assert relative_error(alignment.inner, batch.mask, exact_inner(batch)[0]) < 1e-3


def test_two_steps_cancel_the_first_term_of_the_truncation():
    batch = tiny_policy.Batch()
    expected, _ = exact_inner(batch)
    raw, mended = (
        aligned(batch, tiny_policy.policy(), step=0.1, tolerance=tolerance)
        for tolerance in (0.9, 1e-5)
    )
    assert raw.step_error is None and mended.step == 0.05
    before, after = (relative_error(a.inner, batch.mask, expected) for a in (raw, mended))
    # Halving the step alone would leave a quarter, weights that do not fit a sixteenth at best.
    assert 1e-4 < before and after < before / 100


@pytest.mark.parametrize("method", ["forward", "differences"])
def test_micro_batches_are_rows_of_one_batch(method):
    batch, model = tiny_policy.Batch(), tiny_policy.policy()
    parts = [lambda: batch.loss(model, slice(0, 1)), lambda: batch.loss(model, slice(1, 4))]
    split = tw.token_alignment(parts, model, mask=batch.mask, method=method)
    whole = aligned(batch, model, method=method)
    torch.testing.assert_close(split.inner, whole.inner, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        ({"layers": [1]}, lambda name: name.startswith("layers.1.")),
        ({"pattern": r"weight$"}, lambda name: name.endswith("weight")),
        ({"pattern": "up", "layers": [0]}, lambda name: name.startswith("layers.0.up")),
    ],
)
@pytest.mark.parametrize("method", ["forward", "differences"])
def test_filters_restrict_the_gradient(options, keep, method):
    batch = tiny_policy.Batch()
    expected, square = exact_inner(batch, keep)
    alignment = aligned(batch, tiny_policy.policy(), method=method, **options)
    assert relative_error(alignment.inner, batch.mask, expected) < 1e-3
    assert alignment.full_squared_norm == pytest.approx(square)


def snapshot(model, optimizer):
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    tensors += [v for state in optimizer.state.values() for v in state.values()]
    copies = [tensor.detach().clone() for tensor in tensors]
    return copies, torch.get_rng_state(), random.getstate()


def same(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert torch.equal(first[1], second[1]) and first[2] == second[2]


def stepped(batch, **options):
    """A policy with optimizer state, gradients, and half a dozen awkward values."""
    model = tiny_policy.policy(torch.float32, **options)
    with torch.no_grad():
        model.head.bias[:4] = torch.tensor([0.0, -0.0, 1e-42, -1e30])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch.loss(model).mean().backward()
    optimizer.step()
    with torch.no_grad():
        model.head.bias[:3] = torch.tensor([0.0, -0.0, 1e-42])
    return model, optimizer


@pytest.mark.parametrize("method", ["forward", "differences"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_everything_is_bitwise_unchanged(method, checkpointed):
    batch = tiny_policy.Batch(dtype=torch.float32)
    model, optimizer = stepped(batch, dropout=0.3, checkpointed=checkpointed)
    before = snapshot(model, optimizer)
    gradients = [parameter.grad for parameter in model.parameters()]
    aligned(batch, model, method=method, compare_steps=True, tolerance=1e-3)
    same(before, snapshot(model, optimizer))
    assert torch.signbit(model.head.bias[1])
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("method", ["forward", "differences"])
@pytest.mark.parametrize("failing_pass", [1, 2, 3])
def test_an_exception_leaves_everything_bitwise_unchanged(method, failing_pass):
    batch = tiny_policy.Batch(dtype=torch.float32)
    model, optimizer = stepped(batch, dropout=0.3)
    before, passes = snapshot(model, optimizer), 0

    def loss():
        nonlocal passes
        passes += 1
        result = batch.loss(model)
        if passes == failing_pass:
            raise KeyboardInterrupt
        return result

    if method == "forward" and failing_pass == 3:
        return
    with pytest.raises(KeyboardInterrupt):
        tw.token_alignment(loss, model, mask=batch.mask, method=method)
    same(before, snapshot(model, optimizer))


def test_dropout_is_the_same_on_both_sides():
    batch, model = tiny_policy.Batch(), tiny_policy.policy(dropout=0.3)
    forward = aligned(batch, model, method="forward")
    differences = aligned(batch, model)
    torch.testing.assert_close(differences.inner, forward.inner, rtol=1e-3, atol=1e-6)
    assert relative_error(forward.inner, batch.mask, exact_inner(batch)[0]) > 1e-2


@pytest.mark.parametrize("method", ["forward", "differences"])
@pytest.mark.parametrize("growth", [1.01, 1.0002])
def test_a_loss_that_drifts_does_not_sum_to_one(method, growth):
    batch, model, drift = tiny_policy.Batch(), tiny_policy.policy(), 1.0

    def loss():
        nonlocal drift
        drift *= growth
        return batch.loss(model) * drift

    with pytest.raises(TokenWeightsError, match="sum to one"):
        tw.token_alignment(loss, model, mask=batch.mask, method=method)


def test_a_zero_gradient_has_no_ratio():
    batch, model = tiny_policy.Batch(), tiny_policy.policy()
    batch.advantages *= 0
    alignment = aligned(batch, model)
    assert (alignment.inner == 0).all() and alignment.projection_ratio.isnan().all()


def test_losses_off_the_mask_do_not_matter():
    batch, model = tiny_policy.Batch(), tiny_policy.policy()

    def poisoned():
        return torch.where(batch.mask, batch.loss(model), torch.nan)

    for method in ("forward", "differences"):
        alignment = tw.token_alignment(poisoned, model, mask=batch.mask, method=method)
        torch.testing.assert_close(alignment.inner, aligned(batch, model, method=method).inner)


def test_a_gradient_that_is_not_finite_is_refused():
    """The square root of 0 has a value and no derivative."""
    model, mask = nn.Linear(2, 1), torch.ones(1, 3, dtype=torch.bool)
    inputs = torch.randn(1, 3, 2)

    def loss():
        return (model(inputs)[..., 0] * torch.tensor([0.0, 1.0, 1.0])).abs().sqrt()

    with pytest.raises(TokenWeightsError, match="with a finite gradient, got nan"):
        tw.token_alignment(loss, model, mask=mask)
    with pytest.raises(TokenWeightsError, match="with a finite gradient, got nan"):
        tw.GradientProbe(model).geometry(loss, torch.zeros(1, 3).long(), mask=mask, count=1)


def test_kernels_without_a_forward_mode_are_named():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    model, mask = nn.Linear(2, 1), torch.ones(3, 4, dtype=torch.bool)
    inputs = torch.randn(3, 4, 2)

    def loss():
        return Opaque.apply(model(inputs)[..., 0])

    tw.token_alignment(loss, model, mask=mask)
    with pytest.raises(TokenWeightsError, match="'differences'"):
        tw.token_alignment(loss, model, mask=mask, method="forward")


@pytest.mark.parametrize(
    ("options", "dtype", "passes"),
    [
        ({}, torch.float32, 2),
        ({"tolerance": 1e-5}, torch.float32, 1),
        ({"compare_steps": True}, torch.float32, 1),
        ({"compare_steps": True, "step": 0.1}, torch.float32, 2),
        ({"tolerance": 0.1}, torch.bfloat16, 1),
    ],
)
def test_auto_is_exact_where_that_costs_no_more(options, dtype, passes):
    batch, model, calls = tiny_policy.Batch(dtype=dtype), tiny_policy.policy(dtype), []

    def loss():
        calls.append(1)
        return batch.loss(model)

    found = tw.token_alignment(loss, model, mask=batch.mask, method="auto", **options)
    method = "forward" if passes == 1 else "differences"
    assert len(calls) - 1 >= passes and (found.step == 0) == (passes == 1)
    assert torch.equal(found.inner, aligned(batch, model, method=method, **options).inner)


def test_auto_takes_differences_where_forward_mode_fails():
    class Detached(torch.autograd.Function):
        """A kernel whose forward mode is wrong without a word."""

        @staticmethod
        def forward(ctx, values):
            return values * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

        @staticmethod
        def jvp(ctx, tangent):
            return tangent

    class Opaque(Detached):
        jvp = torch.autograd.Function.jvp

    model, mask = nn.Linear(2, 1), torch.ones(3, 4, dtype=torch.bool)
    inputs = torch.randn(3, 4, 2)
    for kernel in (Detached, Opaque):

        def loss(kernel=kernel):
            return kernel.apply(model(inputs)[..., 0])

        found = tw.token_alignment(loss, model, mask=mask, method="auto", compare_steps=True)
        expected = tw.token_alignment(loss, model, mask=mask, compare_steps=True)
        assert found.step > 0 and torch.equal(found.inner, expected.inner)
    with pytest.raises(TokenWeightsError, match="finite"):
        tw.token_alignment(
            lambda: Opaque.apply(model(inputs)[..., 0]) * torch.nan,
            model,
            mask=mask,
            method="auto",
            compare_steps=True,
        )


def test_nonsense_is_refused():
    batch, model = tiny_policy.Batch(), tiny_policy.policy()
    with pytest.raises(TokenWeightsError, match="graph"):
        tw.token_alignment(lambda: batch.loss(model).detach(), model, mask=batch.mask)
    for part in (slice(0, 3), slice(0, 0)):
        with pytest.raises(TokenWeightsError, match="all rows"):
            tw.token_alignment(lambda part=part: batch.loss(model, part), model, mask=batch.mask)
    with pytest.raises(TokenWeightsError, match="unreduced"):
        tw.token_alignment(lambda: batch.loss(model)[:, :2], model, mask=batch.mask)
    with pytest.raises(TokenWeightsError, match="finite"):
        tw.token_alignment(lambda: batch.loss(model) * torch.nan, model, mask=batch.mask)
    with pytest.raises(TokenWeightsError, match="`token_loss` with a callable, got none"):
        tw.token_alignment([], model, mask=batch.mask)
    for found, got in ((batch.loss(model).mean(), r"\(\)"), (1.0, "float"), (None, "NoneType")):
        with pytest.raises(TokenWeightsError, match=f"unreduced|got {got}"):
            tw.token_alignment(lambda found=found: found, model, mask=batch.mask)
    for tolerance in (0.0, 1.0, float("nan")):
        with pytest.raises(TokenWeightsError, match="tolerance"):
            aligned(batch, model, tolerance=tolerance)
    with pytest.raises(TokenWeightsError, match="names are"):
        aligned(batch, model, pattern="nothing")
    model.head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(TokenWeightsError, match="hooks"):
        aligned(batch, model)
