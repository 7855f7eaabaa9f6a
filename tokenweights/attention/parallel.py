"""Attention entropy where the sequence or the heads are spread over ranks, exact on any layout.

The head average sits inside the logarithm, so entropies of parts cannot be combined. What travels
is therefore the cheaper of keys and queries, from which a rank computes whole rows alone, or the
averaged weights themselves.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import refused_by
from tokenweights._typing import typed
from tokenweights.attention.api import attention_entropy
from tokenweights.attention.checks import (
    check_batch_scores,
    check_exchange,
    check_finite,
    check_logits,
    check_padded,
    check_request,
)
from tokenweights.attention.given_weights import attention_entropy_from_weights
from tokenweights.attention.layout import padded_batch
from tokenweights.attention.reference import visible_keys
from tokenweights.attention.scores import float32_limit, score_range
from tokenweights.attention.statistics import EntropyKind, Logits, Request
from tokenweights.distributed import agreed, agreement, gathered, gathered_on, summed_on
from tokenweights.masked import accumulator_dtype

Exchange = Literal["auto", "rows", "distribution"]


@agreed
@typed
@torch.no_grad()
def sequence_parallel_entropy(
    query: Float[Tensor, "batch heads token dim"],
    key: Float[Tensor, "batch kv_heads token dim"],
    positions: Int[Tensor, " token"],
    *,
    group: dist.ProcessGroup | None = None,
    key_mask: Bool[Tensor, "batch token"] | None = None,
    kind: EntropyKind = "normalized",
    top_k: int = 256,
    fixed_k: int = 256,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch token"]:
    """Attention entropy of this rank's tokens of a sequence-parallel batch, in nats.

    Query rows with all their heads are local: under Ulysses before its all-to-all, under ring and
    zigzag attention always. Only keys travel, once; see `sequence_parallel_bytes`. Rows are worked
    off in runs of consecutive positions, so contiguous and zigzag shards cost one and two sweeps.
    No gradient. Memory is the keys of the whole sequence and a block of rows.

    Args:
        query: Queries of this rank's tokens.
        key: Keys of this rank's tokens.
        positions: Position of each of them in the sequence, padding counted; over all ranks every
            position from 0 occurs once. In any order.
        group: The ranks that share the sequence, all of which have to call; None if this is all.
        key_mask: True at this rank's real tokens; None if there is no padding on any rank.
        kind: As in `attention_entropy`.
        top_k: As in `attention_entropy`.
        fixed_k: As in `attention_entropy`.
        scale: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: As in `attention_entropy`.

    Returns:
        The entropies of this rank's tokens, in their order.

    Raises:
        TokenWeightsError: As `attention_entropy`, or if positions are not a permutation.

    Example:
        >>> query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
        >>> sequence_parallel_entropy(query, key, torch.tensor([2, 0, 1]), kind="raw")
        tensor([[1.0986, 0.0000, 0.6931]])
    """
    request = Request((kind,), top_k, fixed_k)
    function = "sequence_parallel_entropy"
    check_own(function, query, key, request, key_mask, scale, window, softcap, sinks)
    keys, mask = whole_keys(function, key, positions, key_mask, group)
    shape = query.shape[0], query.shape[2]
    entropy = torch.zeros(shape, dtype=torch.float32, device=query.device)
    # Scores may still overflow, on the rank that has them.
    with agreement(function, group), refused_by(function):
        for rows, seen in row_runs(positions):
            entropy[:, rows] = attention_entropy(
                query[:, :, rows],
                keys[:, :, :seen],
                kind=kind,
                top_k=top_k,
                fixed_k=fixed_k,
                scale=scale,
                key_mask=None if mask is None else mask[:, :seen],
                window=window,
                softcap=softcap,
                sinks=sinks,
            )
    return entropy


@agreed
@typed
@torch.no_grad()
def tensor_parallel_entropy(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    *,
    group: dist.ProcessGroup | None = None,
    key_mask: Bool[Tensor, "batch key"] | None = None,
    kind: EntropyKind = "normalized",
    top_k: int = 256,
    fixed_k: int = 256,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    exchange: Exchange = "auto",
) -> Float[Tensor, "batch query"]:
    """Attention entropy where each rank holds some of the heads, the same on every rank, in nats.

    Rows are dealt out in blocks, an early and a late one to each rank, since late rows see more
    keys. The owner of a block either receives its queries and all keys (`"rows"`), or the averaged
    weights that the other ranks computed for their heads (`"distribution"`), which is cheaper for
    short sequences only; see `tensor_parallel_bytes`. No gradient. Memory is the keys of all heads
    and this rank's queries of all heads, or this rank's rows by the number of keys.

    Args:
        query: Queries of this rank's heads, as many on every rank.
        key: Keys of this rank's heads.
        group: The ranks that share the heads, all of which have to call; None if this is all.
        key_mask: True at real keys, the same on every rank.
        kind: As in `attention_entropy`.
        top_k: As in `attention_entropy`.
        fixed_k: As in `attention_entropy`.
        scale: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: Sinks of this rank's heads.
        exchange: What travels; `"auto"` takes what moves fewer bytes.

    Returns:
        The entropies of all queries.

    Raises:
        TokenWeightsError: As `attention_entropy`.

    Example:
        >>> query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
        >>> tensor_parallel_entropy(query, key, kind="raw")
        tensor([[0.0000, 0.6931, 1.0986]])
    """
    function = "tensor_parallel_entropy"
    request = Request((kind,), top_k, fixed_k)
    check_own(function, query, key, request, key_mask, scale, window, softcap, sinks)
    logits = Logits(query.shape[3] ** -0.5 if scale is None else scale, softcap, window=window)
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    if exchange == "auto":
        moved = tensor_parallel_bytes(
            batch=query.shape[0],
            queries=query.shape[2],
            keys=key.shape[2],
            heads=query.shape[1] * ranks,
            kv_heads=key.shape[1] * ranks,
            dim=query.shape[3],
            ranks=ranks,
            element_bytes=query.element_size(),
        )
        exchange = "rows" if moved.rows <= moved.distribution else "distribution"
    whole_heads = exchange == "rows"
    all_keys = all_heads(key, 1, group) if whole_heads else key
    all_sinks = all_heads(sinks, 0, group) if whole_heads and sinks is not None else sinks
    parts: list[tuple[slice, Tensor]] = []
    for owner, rows in dealt_blocks(query.shape[2], ranks):
        block = query[:, :, rows]
        if whole_heads:
            part = gathered_on(owner, block, dim=1, group=group)
        else:
            seen = seen_keys(query, key, rows)
            mask = None if key_mask is None else key_mask[:, :seen]
            part = _mean_weights(block, key[:, :, :seen], mask, logits, sinks)
            part = _summed_on(owner, part, group)
        if owner == rank:
            assert part is not None
            parts.append((rows, part))
    # A rank owns no row of a sequence that is shorter than there are blocks.
    entropies = [query.new_zeros(query.shape[0], 0, dtype=torch.float32)]
    owned = [torch.arange(0, device=query.device)]
    # Only now that all exchanges are done may a rank refuse: the others wait in each of them.
    with agreement(function, group), refused_by(function):
        for rows, part in parts:
            seen = seen_keys(query, key, rows)
            mask = None if key_mask is None else key_mask[:, :seen]
            if whole_heads:
                entropy = attention_entropy(
                    part,
                    all_keys[:, :, :seen],
                    kind=kind,
                    top_k=top_k,
                    fixed_k=fixed_k,
                    scale=scale,
                    key_mask=mask,
                    window=window,
                    softcap=softcap,
                    sinks=all_sinks,
                )
            else:
                entropy = attention_entropy_from_weights(
                    part[:, None],
                    kind=kind,
                    top_k=top_k,
                    fixed_k=fixed_k,
                    key_mask=mask,
                    window=window,
                )
            entropies.append(entropy)
            owned.append(torch.arange(rows.start, rows.stop, device=query.device))
    return gathered(torch.cat(entropies, 1), torch.cat(owned), dim=1, group=group)


@dataclass(frozen=True)
class ExchangeBytes:
    """Bytes that each rank receives on average, by what travels.

    Attributes:
        rows: Keys of all heads, and the queries of the rank's rows.
        distribution: Averaged weights of the rank's rows, float32.
    """

    rows: int
    distribution: int


@typed
def tensor_parallel_bytes(
    *,
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    dim: int,
    ranks: int,
    element_bytes: int,
) -> ExchangeBytes:
    """Bytes that `tensor_parallel_entropy` moves, per rank on average, results excluded.

    Nor do the lengths of shards and the ranks' agreements count, a few dozen bytes at any size.

    Args:
        batch: Rows of the batch.
        queries: Queries of each row.
        keys: Keys of each row.
        heads: Query heads over all ranks.
        kv_heads: Key heads over all ranks.
        dim: Width of a head.
        ranks: Ranks that share the heads.
        element_bytes: Bytes of one number of query and key.

    Returns:
        Bytes for either exchange.

    Example:
        >>> tensor_parallel_bytes(
        ...     batch=1,
        ...     queries=16384,
        ...     keys=16384,
        ...     heads=32,
        ...     kv_heads=8,
        ...     dim=128,
        ...     ranks=8,
        ...     element_bytes=2,
        ... )
        ExchangeBytes(rows=44040192, distribution=499122176)
    """
    sizes = {"batch": batch, "queries": queries, "keys": keys, "heads": heads, "dim": dim}
    sizes |= {"kv_heads": kv_heads, "element_bytes": element_bytes}
    check_exchange("tensor_parallel_bytes", ranks={"ranks": ranks}, **sizes)
    others = ranks - 1
    key_numbers = batch * keys * kv_heads * dim
    query_numbers = batch * queries * heads * dim // ranks
    weights = sum(
        (rows.stop - rows.start) * (keys - queries + rows.stop)
        for _, rows in dealt_blocks(queries, ranks)
    )
    return ExchangeBytes(
        rows=others * (key_numbers + query_numbers) * element_bytes // ranks,
        distribution=others * batch * weights * 4 // ranks,
    )


@typed
def sequence_parallel_bytes(
    *, batch: int, keys: int, kv_heads: int, dim: int, ranks: int, element_bytes: int
) -> int:
    """Bytes that `sequence_parallel_entropy` moves, per rank on average, positions excluded.

    Nor do the lengths of shards and the ranks' agreements count, a few dozen bytes at any size.

    Args:
        batch: Rows of the batch.
        keys: Tokens of the whole sequence.
        kv_heads: Key heads.
        dim: Width of a head.
        ranks: Ranks that share the sequence.
        element_bytes: Bytes of one number of the keys.

    Returns:
        Bytes.

    Example:
        >>> sequence_parallel_bytes(
        ...     batch=1, keys=16384, kv_heads=8, dim=128, ranks=8, element_bytes=2
        ... )
        29360128
    """
    sizes = {"batch": batch, "keys": keys, "kv_heads": kv_heads, "dim": dim}
    sizes |= {"element_bytes": element_bytes}
    check_exchange("sequence_parallel_bytes", ranks={"ranks": ranks}, **sizes)
    return batch * keys * kv_heads * dim * element_bytes * (ranks - 1) // ranks


def check_own(
    function: str,
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    request: Request,
    key_mask: Bool[Tensor, "batch key"] | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Float[Tensor, " heads"] | None,
) -> None:
    """Refuse what this rank alone was given, before it reaches another that would be blamed."""
    check_padded(function, query, key, key_mask, None, sinks)
    check_request(function, request, "mean_distribution")
    check_logits(function, Logits(1.0 if scale is None else scale, softcap, window=window))
    batch = padded_batch(query, key, key_mask, None)
    check_finite(function, batch, sinks)
    check_batch_scores(function, batch, query.shape[3] ** -0.5 if scale is None else scale)


def whole_keys(
    function: str,
    key: Float[Tensor, "batch kv_heads token dim"],
    positions: Int[Tensor, " token"],
    key_mask: Bool[Tensor, "batch token"] | None,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor | None]:
    """Keys and mask of the whole sequence; every rank has to call."""
    with refused_by(function):
        keys = gathered(key, positions, dim=2, group=group)
    if key_mask is None:
        return keys, None
    return keys, gathered(key_mask.to(torch.uint8), positions, dim=1, group=group).bool()


def row_runs(positions: Int[Tensor, " token"]) -> Iterator[tuple[Int[Tensor, " row"], int]]:
    """This rank's rows in runs of consecutive positions, and how many keys each run sees."""
    order = positions.argsort()
    for start, stop in _runs(positions[order]):
        rows = order[start:stop]
        yield rows, int(positions[rows[-1]]) + 1


def _runs(positions: Int[Tensor, " token"]) -> Iterator[tuple[int, int]]:
    """Bounds of the stretches in which ascending positions are consecutive."""
    breaks = (positions.diff() != 1).nonzero().flatten() + 1
    bounds = [0, *breaks.tolist(), len(positions)]
    yield from ((start, stop) for start, stop in itertools.pairwise(bounds) if stop)


def dealt_blocks(queries: int, ranks: int) -> Iterator[tuple[int, slice]]:
    """Blocks of rows and their owners: rank r owns the r-th block and the r-th from the end."""
    for block in range(2 * ranks):
        owner = min(block, 2 * ranks - 1 - block)
        rows = slice(block * queries // (2 * ranks), (block + 1) * queries // (2 * ranks))
        if rows.start < rows.stop:
            yield owner, rows


def seen_keys(query: Tensor, key: Tensor, rows: slice) -> int:
    """Number of keys up to the last query of a block of rows."""
    return key.shape[2] - query.shape[2] + rows.stop


def all_heads(values: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """What ranks hold of their own heads, of all heads; every rank has to call."""
    own = values.shape[dim]
    first = 0 if group is None else group.rank() * own
    places = torch.arange(first, first + own, device=values.device)
    return gathered(values, places, dim=dim, group=group)


def _summed_on(owner: int, weights: Tensor, group: dist.ProcessGroup | None) -> Tensor | None:
    """The mean over ranks, on the owner alone."""
    total = summed_on(owner, weights, group=group)
    return total if total is None or group is None else total / group.size()


def _mean_weights(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    key_mask: Bool[Tensor, "batch key"] | None,
    logits: Logits,
    sinks: Float[Tensor, " heads"] | None,
) -> Float[Tensor, "batch query key"]:
    """Attention weights of a block of rows, averaged over this rank's heads."""
    if key_mask is None:
        key_mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    window = logits.window if logits.window is None else min(logits.window, key.shape[2])
    visible = visible_keys(key_mask, queries=query.shape[2], causal=True, window=window)
    # Padding may hold anything, NaN included: 0 * NaN must not enter a product.
    key = torch.where(key_mask[:, None, :, None], key, 0)
    asked = key_mask[:, None, key.shape[2] - query.shape[2] :, None]
    query = torch.where(asked, query, 0)
    shared_by = query.shape[1] // key.shape[1]
    total = torch.zeros(visible.shape, dtype=torch.float32, device=query.device)
    in_float32 = score_range(query, key, logits.scale).in_float32(float32_limit(query.device))
    with torch.autocast(query.device.type, enabled=False):
        for head, narrow in enumerate(in_float32):
            dtype = torch.float32 if narrow else accumulator_dtype(query.device)
            own_query, own_key = query[:, head].to(dtype), key[:, head // shared_by].to(dtype)
            score = own_query @ own_key.transpose(1, 2) * logits.scale
            if logits.softcap is not None:
                score = logits.softcap * torch.tanh(score / logits.softcap)
            score = score.masked_fill(~visible, -torch.inf)
            own = score.logsumexp(-1, keepdim=True)
            # A padded query sees nothing: -inf - -inf. At real positions a NaN stays, to be refused
            weights = torch.where(visible, (score - own).exp(), 0.0)
            if sinks is not None:
                # A factor, not a term under the logarithm, where a large sink would round scores.
                weights = weights * (own - sinks[head].to(dtype)).sigmoid()
            total += weights
    return total / query.shape[1]
