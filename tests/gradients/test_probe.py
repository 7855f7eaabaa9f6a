"""Geometry of a partition, against per-token Jacobians; sketches, against their error bound."""

import gc
import math
import statistics
import weakref

import pytest
import torch
from gradients import tiny_policy
from torch import nn

import tokenweights as tw
from tokenweights import TokenWeightsError
from tokenweights.gradients.sketch import gradient_sketch, sketched_inner_product


def probed(batch, model, *, groups=None, count=10, options=None, **choices):
    return tw.GradientProbe(model, **(options or {})).geometry(
        lambda: batch.loss(model),
        batch.deciles if groups is None else groups,
        mask=batch.mask,
        count=count,
        **choices,
    )


def exact_geometry(batch, groups, count, denominator):
    rows = tiny_policy.jacobian(tiny_policy.policy(), batch)
    full, members = rows.mean(0), groups[batch.mask]
    found = []
    for number in range(count):
        subset = rows[members == number].sum(0)
        subset = subset / (len(rows) if denominator == "all_tokens" else (members == number).sum())
        inner, norm, full_norm = float(subset @ full), float(subset.norm()), float(full.norm())
        found.append((norm / full_norm, inner / norm / full_norm, inner / full_norm**2))
    return found


def flattened(found):
    return [(g.norm_ratio, g.cosine, g.projection_ratio) for g in found.groups]


def close(found, expected, tolerance=1e-9):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("denominator", ["all_tokens", "selected_tokens"])
@pytest.mark.parametrize("partition", ["deciles", "anchors and explorers"])
def test_geometry_agrees_with_jacobians(checkpointed, denominator, partition):
    batch = tiny_policy.Batch()
    groups, count = batch.deciles, 10
    if partition != "deciles":  # no partition: most tokens are in neither group
        low = tw.bottom_fraction(batch.scores, batch.mask)
        high = tw.top_fraction(batch.scores, batch.mask)
        groups, count = torch.full(batch.mask.shape, -1), 2
        groups[low], groups[high] = 0, 1
    model = tiny_policy.policy(checkpointed=checkpointed)
    found = probed(batch, model, groups=groups, count=count, denominator=denominator)
    close(flattened(found), exact_geometry(batch, groups, count, denominator))


def test_groups_may_overlap_as_masks():
    batch, model = tiny_policy.Batch(), tiny_policy.policy()
    half = tw.random_fraction(batch.mask, fraction=0.5, seed=0)
    masks = torch.stack([batch.deciles == 3, half, torch.ones_like(half)])
    found = probed(batch, model, groups=masks, count=None)
    assert found.groups[0] == probed(batch, model).groups[3]
    inside = exact_geometry(batch, torch.where(half, 0, -1), 1, "all_tokens")
    close(flattened(found)[1:], [*inside, (1.0, 1.0, 1.0)])


def test_micro_batches_are_rows_of_one_batch():
    batch, model = tiny_policy.Batch(), tiny_policy.policy()
    parts = [lambda: batch.loss(model, slice(0, 1)), lambda: batch.loss(model, slice(1, 4))]
    for denominator in ("all_tokens", "selected_tokens"):
        split = tw.GradientProbe(model).geometry(
            parts, batch.deciles, mask=batch.mask, count=10, denominator=denominator
        )
        whole = probed(batch, model, denominator=denominator)
        close(flattened(split), flattened(whole))


def test_everything_is_bitwise_unchanged():
    batch, model = tiny_policy.Batch(), tiny_policy.policy(dropout=0.3)
    batch.loss(model).mean().backward()
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    before, state = [tensor.clone() for tensor in tensors], torch.get_rng_state()
    probed(batch, model)
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_gradients_that_do_not_add_up_are_refused():
    batch, model, passes = tiny_policy.Batch(), tiny_policy.policy(), 0

    def loss():
        nonlocal passes
        passes += 1
        return batch.loss(model) * (1.001 if passes == 3 else 1.0)

    with pytest.raises(TokenWeightsError, match="sum to one"):
        tw.GradientProbe(model).geometry(loss, batch.deciles, mask=batch.mask, count=10)


def test_empty_groups_and_zero_gradients_have_documented_values():
    batch, model = tiny_policy.Batch(), tiny_policy.policy()
    last = probed(batch, model, count=11).groups[10]
    assert last.norm_ratio == last.projection_ratio == 0 and math.isnan(last.cosine)
    batch.advantages *= 0
    found = probed(batch, model)
    assert found.full_norm == 0 and math.isnan(found.groups[0].projection_ratio)


def test_at_most_one_gradient_is_held_beside_the_one_that_accumulates():
    batch, model, most = tiny_policy.Batch(), tiny_policy.policy(), 0
    alive = []

    def gradients():
        nonlocal most
        gc.collect()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        for parameter in model.parameters():
            parameter.grad = None
        alive.append(weakref.ref(flat))
        most = max(most, sum(reference() is not None for reference in alive))
        return [flat]

    found = probed(batch, model, options={"gradients": gradients})
    close(flattened(found), flattened(probed(batch, model)))
    assert most == 1 and len(alive) == 11


@pytest.mark.parametrize("width", [16, 256])
def test_sketches_are_unbiased_within_their_bound(width):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(700, generator=generator, dtype=torch.float64) + 1  # signs have to cancel it
    b = a + torch.randn(700, generator=generator, dtype=torch.float64)
    b[0] = 30.0  # one element that stands out, as in real gradients
    estimates = []
    for seed in range(400):
        first, second = (
            gradient_sketch([x[:300].reshape(3, 100), x[300:]], width=width, seed=seed)
            for x in (a, b)
        )
        estimates.append(sketched_inner_product(first, second) / float(a.norm() * b.norm()))
    cosine = float(a @ b / a.norm() / b.norm())
    spread, bound = statistics.stdev(estimates), math.sqrt((1 + cosine**2) / width)
    assert abs(statistics.mean(estimates) - cosine) < 4 * bound / 400**0.5
    assert 0.5 * bound < spread < 1.1 * bound < 1.1 * math.sqrt(2 / width)


def test_sketched_geometry_is_within_its_error_and_norms_are_exact():
    batch, model = tiny_policy.Batch(), tiny_policy.policy()
    exact = probed(batch, model)
    sketched = probed(batch, model, options={"sketch_width": 4096})
    assert sketched.cosine_error == pytest.approx((2 / 4096) ** 0.5) and exact.cosine_error == 0
    assert sketched.full_norm == exact.full_norm
    for own, one in zip(sketched.groups, exact.groups, strict=True):
        assert own.norm_ratio == one.norm_ratio
        assert abs(own.cosine - one.cosine) < 4 * sketched.cosine_error
    again = probed(batch, model, options={"sketch_width": 4096, "seed": 1})
    assert again.groups[0].cosine != sketched.groups[0].cosine


def test_selected_parameters_know_names_and_layers():
    model = tiny_policy.policy()
    names = list(tw.selected_parameters(model, layers=[1], pattern="bias"))
    assert names == [f"layers.1.{part}.bias" for part in ("attention", "output", "up", "down")]
    model.layers.requires_grad_(False)
    assert list(tw.selected_parameters(model)) == ["embedding.weight", "head.weight", "head.bias"]
    shared = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shared[1].weight = shared[0].weight
    assert list(tw.selected_parameters(shared)) == ["0.weight", "0.bias", "1.bias"]


def test_nonsense_is_refused():
    batch, model = tiny_policy.Batch(), tiny_policy.policy()
    with pytest.raises(TokenWeightsError, match="sketch_width"):
        tw.GradientProbe(model, sketch_width=0)
    with pytest.raises(TokenWeightsError, match="filter"):
        tw.GradientProbe(model, layers=[0], gradients=lambda: [])
    with pytest.raises(TokenWeightsError, match="count"):
        probed(batch, model, count=9)
    with pytest.raises(TokenWeightsError, match="count"):
        probed(batch, model, count=None)
    nothing = tiny_policy.Batch()
    nothing.mask &= False
    with pytest.raises(TokenWeightsError, match="count"):
        probed(nothing, model, count=-1)
    for tolerance in (0.0, math.nan):
        with pytest.raises(TokenWeightsError, match="tolerance"):
            probed(batch, model, tolerance=tolerance)
    with pytest.raises(TokenWeightsError, match="`token_loss` with a callable, got none"):
        tw.GradientProbe(model).geometry([], batch.deciles, mask=batch.mask, count=10)
    with pytest.raises(TokenWeightsError, match=r"a regular expression, got '\(' \(missing \)"):
        tw.selected_parameters(model, pattern="(")
    for layers in ([2], [0, 2], [-1]):
        with pytest.raises(TokenWeightsError, match=r"`layers` among \[0, 1\], got"):
            tw.selected_parameters(model, layers=layers)
