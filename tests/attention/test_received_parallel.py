"""Columns and distances on real gloo ranks equal those of one process."""

import itertools

import pytest
import torch
import torch.distributed as dist
from attention.test_parallel import HEADS, KV_HEADS, TOKENS, batch, shards
from ranks import on_ranks

import tokenweights as tw

OPTIONS = [
    {},
    {"reduction": "sum", "horizon": (1, 6), "window": 5},
    {"reduction": "max", "horizon": (2, None), "softcap": 2.0},
    {"horizon": (0, 9), "scale": 0.5, "heads": [0, 3, 6]},
    {"reduction": "max", "heads": [1, 2]},
]
DISTANCES = [{}, {"bound": 3, "window": 7, "scale": 0.5}]
LENGTHS = [7, 1, 9, 5]


def asked_rows():
    return torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(5)) < 0.6


def packed_row():
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(TOKENS, HEADS, 8, generator=generator)
    key = torch.randn(TOKENS, KV_HEADS, 8, generator=generator)
    return query, key, torch.cat([torch.arange(length) for length in LENGTHS])


def slices(size):
    """Consecutive slices, one of them empty where there are four."""
    cuts = [0, 9, TOKENS] if size == 2 else [0, 4, 4, 17, TOKENS]
    return [slice(cuts[r], cuts[r + 1]) for r in range(size)]


class CountedReductions:
    """Counts what a ring would move for each all-reduce, whose shape follows the keys."""

    def __init__(self):
        self.moved, self.all_reduce = 0, dist.all_reduce

    def __enter__(self):
        def all_reduce(tensor, op, group):
            if tensor.dim() == 3:
                self.moved += 2 * (group.size() - 1) * tensor.nbytes // group.size()
            return self.all_reduce(tensor, op=op, group=group)

        dist.all_reduce = all_reduce
        return self

    def __exit__(self, *_):
        dist.all_reduce = self.all_reduce


def own_columns(rank, size):
    query, key, mask, sinks = batch()
    rows, world, found = asked_rows(), dist.group.WORLD, {}
    for layout, places in shards(size).items():
        own = places[rank]
        part = {"group": world, "key_mask": mask[:, own], "sinks": sinks}
        values = query[:, :, own], key[:, :, own], own
        for number, options in enumerate(OPTIONS):
            columns = tw.sequence_parallel_received(*values, rows=rows[:, own], **part, **options)
            found[layout, number] = own, columns
        for number, options in enumerate(DISTANCES):
            distance = tw.sequence_parallel_distance(*values, **part, **options)
            found[layout, "distance", number] = own, distance
    heads = slice(rank * HEADS // size, (rank + 1) * HEADS // size)
    kv_heads = slice(rank * KV_HEADS // size, (rank + 1) * KV_HEADS // size)
    part = {"group": world, "key_mask": mask, "sinks": sinks[heads]}
    values = query[:, heads, 4:], key[:, kv_heads]
    for number, options in enumerate(OPTIONS):
        columns = tw.tensor_parallel_received(*values, rows=rows[:, 4:], **part, **options)
        found["heads", number] = columns
    for number, options in enumerate(DISTANCES):
        found["heads", "distance", number] = tw.tensor_parallel_distance(*values, **part, **options)
    query, key, positions = packed_row()
    own = slices(size)[rank]
    values = query[own], key[own], positions[own]
    for number, options in enumerate(OPTIONS):
        found["packed", number] = tw.packed_received(
            *values, group=world, rows=rows[0, own], sinks=sinks, **options
        )
    for number, options in enumerate(DISTANCES):
        found["packed", "distance", number] = tw.packed_distance(
            *values, group=world, sinks=sinks, **options
        )
    with CountedReductions() as counted:
        tw.sequence_parallel_received(
            query[None, own].transpose(1, 2),
            key[None, own].transpose(1, 2),
            torch.arange(TOKENS)[own],
            group=world,
        )
    found["bytes"] = counted.moved
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_one_process_and_move_the_bytes_they_say(size):
    query, key, mask, sinks = batch()
    rows, close = asked_rows(), {"atol": 2e-6, "rtol": 1e-5}
    results = on_ranks(own_columns, size)
    known = {"key_mask": mask, "sinks": sinks}
    for number, options in enumerate(OPTIONS):
        options = {"heads": "mean_distribution"} | options
        expected = tw.attention_received(query, key, rows=rows, **known, **options)
        for layout in shards(size):
            got = torch.full_like(expected, torch.nan)
            for result in results:
                own, columns = result[layout, number]
                got[:, own] = columns
            torch.testing.assert_close(got, expected, **close)
        late = {"rows": rows[:, 4:], **known, **options}
        expected = tw.attention_received(query[:, :, 4:], key, **late)
        for result in results:
            torch.testing.assert_close(result["heads", number], expected, **close)
    for number, options in enumerate(DISTANCES):
        expected = tw.attention_distance(query, key, **known, **options)
        for layout in shards(size):
            got = torch.full_like(expected, torch.nan)
            for result in results:
                own, distance = result[layout, "distance", number]
                got[:, own] = distance
            torch.testing.assert_close(got, expected, **close)
        for result in results:
            torch.testing.assert_close(
                result["heads", "distance", number], expected[:, 4:], **close
            )
    said = tw.received_bytes(batch=1, keys=TOKENS, ranks=size)
    assert [result["bytes"] for result in results] == [said] * size


@pytest.mark.parametrize("size", [2, 4])
def test_slices_of_a_packed_row_agree_with_the_whole_row(size):
    query, key, _ = packed_row()
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    sinks, rows = batch()[3], asked_rows()[0]
    results = on_ranks(own_columns, size)
    cut = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "sinks": sinks}
    for number, options in enumerate(OPTIONS):
        options = {"heads": "mean_distribution"} | options
        expected = tw.attention_received_varlen(query, key, rows=rows, **cut, **options)
        got = torch.cat([result["packed", number] for result in results])
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    for number, options in enumerate(DISTANCES):
        got = torch.cat([result["packed", "distance", number] for result in results])
        for start, stop in itertools.pairwise(bounds.tolist()):
            part = [x[start:stop].transpose(0, 1)[None] for x in (query, key)]
            expected = tw.attention_distance(*part, sinks=sinks, **options)[0]
            torch.testing.assert_close(got[start:stop], expected, atol=2e-6, rtol=1e-5)


def broken(rank, size):
    query, key, mask, _ = batch()
    if rank == 1:
        query[:, :, 20] = torch.inf
    own = shards(size)["ulysses"][rank]
    try:
        tw.sequence_parallel_received(
            query[:, :, own], key[:, :, own], own, group=dist.group.WORLD, key_mask=mask[:, own]
        )
    except tw.TokenWeightsError as error:
        return str(error)


def test_what_one_rank_refuses_is_refused_on_all():
    first, second = on_ranks(broken, 2)
    assert "finite" in second and "global rank 1" in first


def test_heads_that_no_rank_has_are_refused():
    query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    for reduction in ("mean", "max"):
        with pytest.raises(tw.TokenWeightsError, match="from 0 to 3"):
            tw.tensor_parallel_received(query, key, heads=[4], reduction=reduction)
