"""Batch-wide quantities on real gloo ranks equal those of one process with the whole batch."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

import tokenweights as tw
from tokenweights import Endpoints

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


def test_positions_have_to_fit_the_axis():
    for values, dim in ((torch.arange(5.0)[None], 1), (torch.arange(3.0)[None], 2)):
        with pytest.raises(tw.TokenWeightsError, match="entries along axis"):
            tw.gathered(values, torch.arange(3), dim=dim)
