"""Batch-wide quantities on real gloo ranks equal those of one process with the whole batch."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

import tokenweights as tw
from tokenweights import Endpoints
from tokenweights.distributed import gathered_on, held_by_one, largest_of, summed_on

# Rows of each rank: uneven, and one rank without a row.
ROWS = {2: [range(0, 4), range(4, 5)], 4: [range(0, 2), range(2, 2), range(2, 3), range(3, 5)]}


def batch():
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(5, 9, generator=generator)
    mask = torch.rand(5, 9, generator=generator) < 0.7
    return torch.where(mask, scores, torch.nan), mask


def quantities(scores, mask, sample_ids, group):
    """Everything that spans the batch, rows first and scalars second."""
    ends = Endpoints(0.25, 2.0)
    weights = tw.endpoint_weights(scores, mask, ends, group=group)
    literal = tw.endpoint_weights(scores, mask, ends, form="literal", eps=1e-2, group=group)
    matched = tw.match_mass(weights, mask, group=group)
    hard = tw.recipe("random20").token_weights(
        None, mask, step=0, sample_ids=sample_ids, group=group
    )
    statistics = tw.weight_statistics(weights, mask, group=group)
    metrics = tw.token_weight_metrics(scores, weights, mask, group=group)
    dynamics = tw.group_dynamics(scores, [mask, mask & (scores > 0.5)], group=group)
    scalars = [
        *(
            tw.loss_denominator(mask, weights * hard, denominator=name, group=group)
            for name in ("all_tokens", "selected_tokens", "weight_sum")
        ),
        tw.recipe("anchor20").denominator_scale(hard, mask, group=group),
        statistics.mean,
        statistics.effective_sample_size,
        *statistics.share,
        *map(torch.tensor, metrics.values()),
        *torch.stack([dynamics.count, dynamics.mean, dynamics.std]).flatten(),
    ]
    rows = torch.stack([weights, literal, matched, hard], 1)
    return rows, torch.stack([scalar.double() for scalar in scalars])


def own_quantities(rank, size):
    scores, mask = batch()
    own = torch.tensor(list(ROWS[size][rank]), dtype=torch.long)
    return quantities(scores[own], mask[own], own, dist.group.WORLD)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_one_process(size):
    rows, scalars = quantities(*batch(), torch.arange(5), None)
    results = on_ranks(own_quantities, size)
    torch.testing.assert_close(torch.cat([own for own, _ in results]), rows)
    for _, own in results:
        torch.testing.assert_close(own, scalars, rtol=1e-6, atol=1e-9)


def of_any_strides(rank, size):
    """Merges of a matrix that one rank holds by columns and the other by rows."""
    group, whole = dist.group.WORLD, torch.arange(6.0).view(2, 3)
    other = torch.empty_strided(whole.shape, (1, 2)).copy_(whole)
    own = other if rank else whole
    assert own.is_contiguous() == (rank == 0)
    shard = torch.arange(3) + 3 * rank
    return {
        "sum": tw.global_sum(own, group=group),
        "sum on one": summed_on(0, own.clone(), group=group),
        "largest": largest_of(own * (1 - 2 * rank), group=group),
        "gathered": tw.gathered(own, shard, dim=1, group=group),
        "gathered on one": gathered_on(0, own, dim=0, group=group),
        "held by the last": held_by_one(own if rank else None, group=group),
    }


def test_strides_do_not_show_in_a_merge():
    whole = torch.arange(6.0).view(2, 3)
    expected = {
        "sum": 2 * whole,
        "sum on one": 2 * whole,
        "largest": whole,
        "gathered": torch.cat([whole, whole], 1),
        "gathered on one": torch.cat([whole, whole]),
        "held by the last": whole,
    }
    for rank, found in enumerate(on_ranks(of_any_strides, 2)):
        for name, wanted in expected.items():
            if rank and name.endswith("on one"):
                assert found[name] is None
            else:
                assert torch.equal(found[name], wanted), (rank, name)


def extrema_with_nan(rank, size):
    """For each rank that may have it: extrema of which one or both are NaN there."""
    numbers = torch.tensor(float(rank)), torch.tensor(float(rank))
    unknown = torch.tensor(torch.nan)
    found = [tw.global_extrema(*numbers, group=dist.group.WORLD)]
    for owner in range(size):
        for bad in ((True, False), (False, True), (True, True)):
            own = (
                unknown if wrong and rank == owner else number
                for wrong, number in zip(bad, numbers, strict=True)
            )
            found.append(tw.global_extrema(*own, group=dist.group.WORLD))
    return torch.tensor(found)


@pytest.mark.parametrize("size", [1, 3])
def test_extrema_are_nan_on_every_rank_wherever_one_is(size):
    low, high, nan = 0.0, size - 1.0, torch.nan
    expected = [[low, high]] + [[nan, high], [low, nan], [nan, nan]] * size
    for found in on_ranks(extrema_with_nan, size):
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_extrema_of_no_token_and_of_one_rank():
    none = torch.tensor(torch.inf)
    assert tw.global_extrema(none, -none) == (none, -none)
    assert all(end.isnan() for end in tw.global_extrema(none * 0, none * 0))


def test_positions_have_to_fit_the_axis():
    for values, dim in ((torch.arange(5.0)[None], 1), (torch.arange(3.0)[None], 2)):
        with pytest.raises(tw.TokenWeightsError, match="entries along axis"):
            tw.gathered(values, torch.arange(3), dim=dim)
