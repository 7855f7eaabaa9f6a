"""Entropies of packed rows over a grid of gloo ranks equal those of each sequence alone."""

import functools

import pytest
import torch
import torch.distributed as dist
from attention.counted import CountedBytes
from ranks import Ranks

import tokenweights as tw

HEADS, KV_HEADS, DIM = 8, 4, 8
LENGTHS = (8, 0, 16, 24, 8)  # each a multiple of what zigzag deals out on four ranks
REAL = (8, 0, 11, 19, 5)
TOTAL = sum(LENGTHS)
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0)
GRIDS = {"tokens": (1, 4), "heads": (4, 1), "both": (2, 2)}
OPTIONS = [
    {"kind": "normalized"},
    {"kind": "raw", "window": 5},
    {"kind": "topk", "top_k": 3, "softcap": 2.0},
    {"kind": "fixed", "fixed_k": 4, "scale": 0.5},
]


def row():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(TOTAL, HEADS, DIM, generator=generator) * 2
    key = torch.randn(TOTAL, KV_HEADS, DIM, generator=generator)
    places = zip(BOUNDS.tolist(), LENGTHS, REAL, strict=False)
    mask = torch.cat([torch.arange(length) < real for _, length, real in places])
    return query, key, mask, torch.randn(HEADS, generator=generator)


def alone(query, key, sinks, options, lengths=REAL):
    """Entropies of each sequence's real tokens by itself, dense and in float64, 0 at padding."""
    found = torch.zeros(TOTAL, dtype=torch.float64)
    for start, length in zip(BOUNDS.tolist(), lengths, strict=False):
        own = slice(start, start + length)
        q, k = (states[own].transpose(0, 1)[None].double() for states in (query, key))
        dense = {"backend": "reference", "sinks": sinks}
        found[own] = tw.attention_entropy(q, k, **dense, **options)[0].double()
    return found


def layouts(ranks):
    """Tokens of each rank: zigzag within each sequence, slices of unequal size, and striped."""
    zigzag = [[] for _ in range(ranks)]
    for start, length in zip(BOUNDS.tolist(), LENGTHS, strict=False):
        blocks = (start + torch.arange(length)).tensor_split(2 * ranks)
        for rank in range(ranks):
            zigzag[rank] += [blocks[rank], blocks[-1 - rank]]
    whole = torch.arange(TOTAL)
    slices = [*whole[: TOTAL - 3].tensor_split(max(1, ranks - 1)), whole[TOTAL - 3 :]]
    return {
        "zigzag": [torch.cat(parts) for parts in zigzag],
        "slices": slices if ranks > 1 else [whole],
        "striped": [whole[rank::ranks].flip(0) for rank in range(ranks)],
    }


@functools.cache
def grid(head_ranks, token_ranks):
    """This rank's groups along both axes, heads first as Megatron numbers its ranks."""
    rank, numbers = dist.get_rank(), torch.arange(head_ranks * token_ranks)
    numbers = numbers.view(token_ranks, head_ranks)
    by_heads = [dist.new_group(ranks.tolist()) for ranks in numbers]
    by_tokens = [dist.new_group(ranks.tolist()) for ranks in numbers.T]
    return by_heads[rank // head_ranks], by_tokens[rank % head_ranks]


def place(rank, name):
    """The groups of a grid, and this rank's heads, key heads, place in the row, and ranks of it."""
    head_ranks, token_ranks = GRIDS[name]
    head_group, token_group = grid(head_ranks, token_ranks)
    own = rank % head_ranks
    heads = slice(own * HEADS // head_ranks, (own + 1) * HEADS // head_ranks)
    kv_heads = slice(own * KV_HEADS // head_ranks, (own + 1) * KV_HEADS // head_ranks)
    groups = {"head_group": head_group, "token_group": token_group}
    return groups, heads, kv_heads, rank // head_ranks, token_ranks


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4, seconds=90) as pool:
        yield pool


def entropies_on(rank, size, name, options, padded):
    groups, heads, kv_heads, slot, token_ranks = place(rank, name)
    query, key, mask, sinks = row()
    if padded:  # whatever stands there, and travels
        query[~mask], key[~mask] = torch.nan, torch.nan
    found = {}
    for layout, tokens in layouts(token_ranks).items():
        own = tokens[slot]
        found[layout] = (
            own,
            tw.sharded_entropy(
                query[own][:, heads],
                key[own][:, kv_heads],
                own,
                BOUNDS,
                **groups,
                key_mask=mask[own] if padded else None,
                sinks=sinks[heads],
                **options,
            ),
        )
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=[o["kind"] for o in OPTIONS])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_a_grid_of_ranks_agrees_with_each_sequence_alone(ranks, name, options, padded):
    query, key, _, sinks = row()
    expected = alone(query, key, sinks, options, REAL if padded else LENGTHS)
    answers = ranks(entropies_on, name, options, padded)
    for layout in layouts(1):
        got = torch.full_like(expected, torch.nan)
        for answer in answers:
            own, entropy = answer[layout]
            # The ranks that share the heads have the same tokens, and find the same.
            seen = ~got[own].isnan()
            assert torch.equal(got[own][seen], entropy.double()[seen])
            got[own] = entropy.double()
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def bytes_on(rank, size, name):
    groups, heads, kv_heads, slot, token_ranks = place(rank, name)
    query, key, _, _ = row()
    own = layouts(token_ranks)["zigzag"][slot]
    with CountedBytes(dims=3) as counted:
        tw.sharded_entropy(query[own][:, heads], key[own][:, kv_heads], own, BOUNDS, **groups)
    return counted.received


@pytest.mark.parametrize("name", GRIDS)
def test_ranks_move_the_bytes_they_say(ranks, name):
    head_ranks, token_ranks = GRIDS[name]
    said = tw.sharded_bytes(
        tokens=TOTAL,
        heads=HEADS,
        kv_heads=KV_HEADS,
        dim=DIM,
        token_ranks=token_ranks,
        head_ranks=head_ranks,
        element_bytes=4,
    )
    assert sum(ranks(bytes_on, name)) / 4 == pytest.approx(said, rel=0.01)


def shared_keys_on(rank, size):
    """Two key heads over four ranks: each rank holds the one that its queries use."""
    groups, heads, _, _, _ = place(rank, "heads")
    query, key, _, _ = row()
    return tw.sharded_entropy(
        query[:, heads], key[:, [rank // 2]], torch.arange(TOTAL), BOUNDS, **groups, kind="raw"
    )


def test_there_may_be_fewer_key_heads_than_ranks(ranks):
    query, key, _, _ = row()
    expected = alone(query, key[:, :2], None, {"kind": "raw"}, LENGTHS)
    for entropy in ranks(shared_keys_on):
        torch.testing.assert_close(entropy.double(), expected, atol=1e-5, rtol=0)


REFUSED = {
    "a type": {"query": None},
    "a shape": {"key": torch.ones(6, 3, DIM)},
    "a value": {"query": torch.full((6, 2, DIM), torch.nan)},
    "an option": {"top_k": 0},
    "heads": {"key": torch.ones(6, 2, DIM)},
    "boundaries": {"cu_seqlens": torch.tensor([0, 5, 3])},
    "a total": {"cu_seqlens": torch.tensor([0, 5])},
    "an overflow": {"query": torch.full((6, 2, DIM), 1e30), "key": torch.full((6, 1, DIM), 1e30)},
}


def refused_on(rank, size, bad, refusing):
    groups, *_, slot, _ = place(rank, "both")
    good = {"query": torch.ones(6, 2, DIM), "key": torch.ones(6, 1, DIM), "scale": 1.0}
    good |= {"positions": torch.arange(6) + 6 * slot, "cu_seqlens": torch.tensor([0, 12])}
    try:
        tw.sharded_entropy(**good | (bad if rank == refusing else {}), **groups)
        message = None
    except tw.TokenWeightsError as error:
        message = str(error)
    again = tw.sharded_entropy(**good, **groups)
    return message, bool(again.isfinite().all())


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("refusing", [1, 2])
def test_what_one_rank_refuses_the_whole_grid_refuses(ranks, name, refusing):
    answers = ranks(refused_on, REFUSED[name], refusing)
    assert all(message is not None and goes_on for message, goes_on in answers)
    if name not in ("heads", "an overflow"):
        assert "global rank" not in answers[refusing][0]
        assert all(
            f"global rank {refusing}: " in m for r, (m, _) in enumerate(answers) if r != refusing
        )


@pytest.mark.parametrize("total", [59, 61])
def test_boundaries_of_another_row_are_refused_with_a_mask_too(total):
    query, key, mask, _ = row()
    bounds = torch.tensor([0, total])
    with pytest.raises(tw.TokenWeightsError, match=r"`cu_seqlens` ending with the 56 tokens"):
        tw.sharded_entropy(query, key, torch.arange(TOTAL), bounds, key_mask=mask)


def test_a_row_of_nothing_has_no_entropies():
    nothing = torch.zeros(0, 2, DIM)
    found = tw.sharded_entropy(nothing, nothing, torch.arange(0), torch.tensor([0]))
    assert found.shape == (0,)
