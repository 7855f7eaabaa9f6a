"""Records of parts of a batch merge into that of the whole: over micro-batches and over ranks."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from strategies import scored_masks

import tokenweights as tw
from tokenweights import AttentionStatistics, TokenWeightsError

RANKS = 3
# Rows of each rank: uneven, and one rank without a row.
ROWS = [range(0, 3), range(3, 3), range(3, 5)]


def batch(scores, mask, seed):
    """Everything the statistics read, with NaN off the mask."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    rows, tokens = mask.shape
    layers = torch.stack([scores, rand(rows, tokens), scores + rand(rows, tokens)])
    spans = torch.where(mask[:, None], rand(rows, 2, tokens), torch.nan)
    return {
        "scores": scores,
        "mask": mask,
        "layers": torch.where(mask, layers, torch.nan).movedim(0, 1),
        "heads": torch.where(mask[:, None], rand(rows, 2, tokens), torch.nan),
        "spans": spans,
        "sizes": (rand(rows, 2, tokens, 3) * 9).long(),
        "ids": (rand(rows, tokens) * 7).long(),
        "rewards": torch.where(mask.any(-1), rand(rows), torch.nan),
    }


def records(scores, mask, layers, heads, spans, sizes, ids, rewards, group=None):
    high = mask & (scores > 0.5)
    statistics = AttentionStatistics(support_size=sizes, local_mass=spans, mean_distance=spans)
    quadrants = tw.median_quadrants(scores, layers[:, 1], mask)
    plain = AttentionStatistics(raw=scores, topk=layers[:, 1], support_size=sizes[:, 0])
    return {
        "dynamics": tw.group_dynamics(heads, [mask, high], group=group),
        "moments": tw.score_moments(layers.movedim(1, 0), mask, group=group),
        "agreement": tw.layer_agreement(layers.movedim(1, 0), mask, group=group),
        "overlap": tw.subset_overlap([mask, high], mask, group=group),
        "support": tw.support_concentration(statistics, [mask, high], group=group),
        "by_entropy": tw.support_by_entropy(plain, mask, group=group)["topk"],
        "tokens": tw.quadrant_tokens(ids, quadrants, vocab_size=7, group=group),
        "rollouts": tw.rollout_statistics(mask, rewards, group=group),
    }


def flat(record):
    if dataclasses.is_dataclass(record):
        parts = [flat(value) for value in vars(record).values() if value is not None]
        return torch.cat(parts)
    return record.double().flatten()


def assert_same(got, whole):
    for name in whole:
        torch.testing.assert_close(
            flat(got[name]), flat(whole[name]), rtol=1e-9, atol=1e-9, equal_nan=True, msg=name
        )


def taken(everything, rows):
    return {name: values[rows] for name, values in everything.items()}


@given(scored_masks(max_batch=6), st.integers(0, 1000), st.integers(0, 6), st.integers(0, 6))
def test_micro_batches_merge_into_the_whole(case, seed, one, two):
    everything = batch(*case, seed)
    one, two = sorted((min(one, len(case[1])), min(two, len(case[1]))))
    parts = [
        records(**taken(everything, rows))
        for rows in (slice(0, one), slice(one, two), slice(two, None))
    ]
    merged = {
        # Both groupings: a merge is associative.
        name: [
            parts[0][name].merged(parts[1][name]).merged(parts[2][name]),
            parts[0][name].merged(parts[1][name].merged(parts[2][name])),
        ]
        for name in parts[0]
    }
    whole = records(**everything)
    for place in range(2):
        assert_same({name: pair[place] for name, pair in merged.items()}, whole)


def on_own_rows(rank, size, everything):
    own = taken(everything, torch.tensor(list(ROWS[rank]), dtype=torch.long))
    whole = records(**own, group=dist.group.WORLD)
    # Micro-batches first, ranks second.
    halves = [records(**taken(own, rows)) for rows in (slice(0, 1), slice(1, None))]
    later = {
        name: halves[0][name].merged(halves[1][name]).over_ranks(dist.group.WORLD) for name in whole
    }
    jaccard = tw.partition_jaccard(
        own["mask"], own["scores"] > 0.5, own["mask"], group=dist.group.WORLD
    )
    return [{name: flat(record) for name, record in got.items()} for got in (whole, later)], jaccard


def test_ranks_merge_into_the_whole():
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(5, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 9, generator=generator) < 0.7
    everything = batch(torch.where(mask, scores, torch.nan), mask, 0)
    whole = {name: flat(record) for name, record in records(**everything).items()}
    jaccard = tw.partition_jaccard(mask, scores > 0.5, mask)
    with Ranks(RANKS) as ranks:
        for both, own_jaccard in ranks(on_own_rows, everything):
            for got in both:
                assert_same(got, whole)
            assert own_jaccard == jaccard


@pytest.mark.parametrize(
    "first, second",
    [
        (
            tw.subset_overlap([torch.ones(1, 2).bool()], torch.ones(1, 2).bool()),
            tw.subset_overlap([torch.ones(1, 2).bool()] * 2, torch.ones(1, 2).bool()),
        ),
        (
            tw.SupportConcentration(torch.ones(1), distance_total=torch.ones(1)),
            tw.SupportConcentration(torch.ones(1), local_total=torch.ones(1)),
        ),
        (
            tw.score_moments(torch.ones(1, 1, 2), torch.ones(1, 2).bool()),
            tw.score_moments(torch.ones(2, 1, 2), torch.ones(1, 2).bool()),
        ),
        (
            tw.group_dynamics(torch.ones(1, 2), [torch.ones(1, 2).bool()]),
            tw.group_dynamics(torch.ones(1, 2), [torch.ones(1, 2).bool()] * 2),
        ),
    ],
    ids=lambda record: type(record).__name__,
)
def test_records_of_different_groups_do_not_merge(first, second):
    with pytest.raises(TokenWeightsError, match="same statistics"):
        first.merged(second)
