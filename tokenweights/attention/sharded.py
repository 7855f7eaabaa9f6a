"""Attention entropy of packed rows whose tokens and whose heads are spread over a grid of ranks.

One axis of the grid shares the tokens, in any order of theirs, the other shares the heads: context
and tensor parallelism. Keys travel along both axes, once; queries travel along the axis of heads
only, to the one rank that computes their rows.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid, refused_by
from tokenweights._typing import typed
from tokenweights.attention.api import attention_entropy_varlen
from tokenweights.attention.checks import check_exchange
from tokenweights.attention.parallel import check_own, dealt_blocks
from tokenweights.attention.statistics import EntropyKind, Request
from tokenweights.distributed import _communicating, agreed, agreement, gathered, gathered_on

FUNCTION = "sharded_entropy"


@agreed
@typed
@torch.no_grad()
def sharded_entropy(
    query: Float[Tensor, "token heads dim"],
    key: Float[Tensor, "token kv_heads dim"],
    positions: Int[Tensor, " token"],
    cu_seqlens: Int[Tensor, " boundary"],
    *,
    token_group: dist.ProcessGroup | None = None,
    head_group: dist.ProcessGroup | None = None,
    key_mask: Bool[Tensor, " token"] | None = None,
    kind: EntropyKind = "normalized",
    top_k: int = 256,
    fixed_k: int = 256,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, " token"]:
    """Attention entropy of this rank's tokens of a packed row over a grid of ranks, in nats.

    A packed row holds sequences one after another, each of which attends to itself. Ranks of
    `token_group` hold different tokens of it, consecutive ones or zigzag or any others; ranks of
    `head_group` hold the same tokens and different heads. A padded batch is a packed row as well:
    its rows one after another, with a mask. No gradient. Memory is twice the keys of the whole row
    with all heads, this rank's queries of all heads divided by the ranks that share the heads, and
    a bounded workspace. For the bytes that travel see `sharded_bytes`.

    Args:
        query: Queries of this rank's tokens and heads; as many heads on every rank.
        key: Keys of this rank's tokens and heads. Where there are fewer key heads than ranks, each
            rank passes the one that its queries use.
        positions: Place of each of them in the packed row; over the ranks that share the tokens
            every place from 0 occurs once. In any order.
        cu_seqlens: Where the sequences begin in the whole row, and its length; the same on every
            rank.
        token_group: The ranks that share the tokens, all of which have to call; None if this rank
            has all of them.
        head_group: The ranks that share the heads, all of which have to call; None if this rank has
            all of them.
        key_mask: True at this rank's real tokens; None if there is no padding on any rank.
        kind: As in `attention_entropy`.
        top_k: As in `attention_entropy`.
        fixed_k: As in `attention_entropy`.
        scale: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: Sinks of this rank's heads.

    Returns:
        The entropies of this rank's tokens in their order, the same on every rank that shares their
        heads; 0 at padding.

    Raises:
        TokenWeightsError: As `attention_entropy`, or if positions are not a permutation, or the
            boundaries not those of the row. What one rank refuses, every rank refuses.

    Example:
        >>> query, key = torch.zeros(5, 4, 8), torch.zeros(5, 2, 8)
        >>> sharded_entropy(
        ...     query, key, torch.tensor([4, 0, 1, 2, 3]), torch.tensor([0, 2, 5]), kind="raw"
        ... )
        tensor([1.0986, 0.0000, 0.6931, 0.0000, 0.6931])
    """
    head_group, token_group = _several(head_group), _several(token_group)
    own = query.transpose(0, 1)[None], key.transpose(0, 1)[None]
    mask = None if key_mask is None else key_mask[None]
    check_own(FUNCTION, *own, Request((kind,), top_k, fixed_k), mask, scale, window, softcap, sinks)
    _check_boundaries(cu_seqlens)
    shapes = f"{query.dtype} of {list(query.shape[1:])} and {list(key.shape[1:])}"
    given = f"sinks {sinks is not None}, mask {key_mask is not None}"
    _communicating(f"exchange {shapes}, {given}", head_group or token_group)
    key = _with_all_heads(key, 1, head_group)
    with refused_by(FUNCTION):
        keys = gathered(key, positions, dim=0, group=token_group)
    bounds, places, total = cu_seqlens.long().contiguous(), positions.long(), len(keys)
    real = torch.ones_like(places, dtype=torch.bool)
    if key_mask is not None:
        whole = gathered(key_mask.to(torch.uint8), positions, dim=0, group=token_group).bool()
        # Padding is left out of the row: then no rule about it is needed anywhere below.
        before = torch.cat([bounds.new_zeros(1), whole.cumsum(0)])
        keys, real, places = keys[whole], key_mask, before[places]
        bounds = before[bounds.clamp(max=total)]
    all_sinks = None if sinks is None else _with_all_heads(sinks, 0, head_group)
    order = positions.argsort()
    order = order[real[order]]
    own_rows, queries = _rows_of_this_rank(query[order], head_group)
    # Scores may still overflow, on the rank that has them.
    with agreement(FUNCTION, head_group, token_group), refused_by(FUNCTION):
        if int(cu_seqlens[-1]) != total:
            raise invalid(
                FUNCTION,
                "cu_seqlens",
                f"ending with the {total} tokens of the whole row",
                int(cu_seqlens[-1]),
                "Count the tokens of all ranks.",
            )
        entropies = query.new_zeros(len(own_rows), dtype=torch.float32)
        for part in _sweeps(places[order][own_rows], bounds, len(keys)):
            entropies[part.rows] = attention_entropy_varlen(
                queries[part.rows],
                keys[part.keys],
                cu_seqlens_q=part.query_bounds,
                cu_seqlens_k=part.key_bounds,
                kind=kind,
                top_k=top_k,
                fixed_k=fixed_k,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=all_sinks,
            )
    found = query.new_zeros(len(positions), dtype=torch.float32)
    found[order] = gathered(entropies, own_rows, dim=0, group=head_group)
    return found


@typed
def sharded_bytes(
    *,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    token_ranks: int,
    head_ranks: int,
    element_bytes: int,
) -> int:
    """Bytes that `sharded_entropy` moves, per rank on average, positions and results excluded.

    Nor do the lengths of shards and the ranks' agreements count, a few dozen bytes at any size.

    Args:
        tokens: Tokens of the whole row.
        heads: Query heads over all ranks.
        kv_heads: Key heads over all ranks, counted as often as ranks hold them.
        dim: Width of a head.
        token_ranks: Ranks that share the tokens.
        head_ranks: Ranks that share the heads.
        element_bytes: Bytes of one number of query and key.

    Returns:
        Bytes.

    Example:
        >>> sharded_bytes(
        ...     tokens=16384,
        ...     heads=32,
        ...     kv_heads=8,
        ...     dim=128,
        ...     token_ranks=2,
        ...     head_ranks=4,
        ...     element_bytes=2,
        ... )
        41943040
    """
    sizes = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "dim": dim}
    shared = {"token_ranks": token_ranks, "head_ranks": head_ranks}
    check_exchange("sharded_bytes", ranks=shared, element_bytes=element_bytes, **sizes)
    ranks = token_ranks * head_ranks
    keys = tokens * kv_heads * (ranks - 1) / ranks
    queries = tokens * heads * (head_ranks - 1) / (head_ranks * ranks)
    return round((keys + queries) * dim * element_bytes)


@dataclass(frozen=True)
class _Sweep:
    """Some of a rank's rows, and the keys of the row that they see, one stretch after another."""

    rows: slice
    keys: slice | Int[Tensor, " key"]
    query_bounds: Int[Tensor, " boundary"]
    key_bounds: Int[Tensor, " boundary"]


def _sweeps(
    places: Int[Tensor, " row"], bounds: Int[Tensor, " boundary"], total: int
) -> Iterator[_Sweep]:
    """Ascending places in sweeps of stretches, which take no more keys together than the row has.

    A stretch is a run of consecutive places in one sequence; it sees the keys from the start of its
    sequence to its own end. Contiguous and zigzag shards make one or two sweeps of all their
    sequences; a striped one is all stretches of one token.
    """
    begins = torch.ones_like(places, dtype=torch.bool)
    begins[1:] = (places.diff() != 1) | torch.isin(places[1:], bounds)
    rows = begins.nonzero().flatten()
    starts = bounds[torch.searchsorted(bounds, places[rows], right=True) - 1]
    stops = torch.cat([places[rows[1:] - 1], places[-1:]]) + 1
    edges = [*rows.tolist(), len(places)]
    spans = list(zip(starts.tolist(), stops.tolist(), strict=True))
    first = 0
    while first < len(spans):
        last, taken = first, 0
        while last < len(spans) and (last == first or taken + _length(spans[last]) <= total):
            taken += _length(spans[last])
            last += 1
        own = spans[first:last]
        lengths = [0, *itertools.accumulate(map(_length, own))]
        if all(one[1] == other[0] for one, other in itertools.pairwise(own)):
            keys: slice | Tensor = slice(own[0][0], own[-1][1])
        else:
            keys = torch.cat([torch.arange(*span, device=places.device) for span in own])
        yield _Sweep(
            rows=slice(edges[first], edges[last]),
            keys=keys,
            query_bounds=places.new_tensor(
                [edge - edges[first] for edge in edges[first : last + 1]]
            ),
            key_bounds=places.new_tensor(lengths),
        )
        first = last


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _rows_of_this_rank(
    query: Float[Tensor, "row heads dim"], group: dist.ProcessGroup | None
) -> tuple[Int[Tensor, " own"], Float[Tensor, "own all_heads dim"]]:
    """Which rows this rank computes, an early and a late block of them, and all heads' queries."""
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    rows = [torch.arange(0, device=query.device)]
    queries = [query.new_zeros(0, query.shape[1] * ranks, query.shape[2])]
    for owner, block in dealt_blocks(len(query), ranks):
        part = gathered_on(owner, query[block], dim=1, group=group)
        if owner == rank:
            assert part is not None
            rows.append(torch.arange(block.start, block.stop, device=query.device))
            queries.append(part)
    return torch.cat(rows), torch.cat(queries)


def _with_all_heads(values: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    own = values.shape[dim]
    first = 0 if group is None else group.rank() * own
    places = torch.arange(first, first + own, device=values.device)
    return gathered(values, places, dim=dim, group=group)


def _several(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group, unless it is of one rank, which exchanges nothing."""
    return None if group is None or group.size() == 1 else group


def _check_boundaries(cu_seqlens: Int[Tensor, " boundary"]) -> None:
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds != sorted(bounds):
        raise invalid(
            FUNCTION, "cu_seqlens", "ascending from 0", bounds, "Pass cumulative lengths."
        )
