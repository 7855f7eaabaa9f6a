"""Attention received where the sequence or the heads are spread over ranks.

What keys receive is a sum over queries and a mean over heads: ranks that hold some of either add
their columns up, two numbers for each key of the sequence. Only a maximum over queries of the mean
over heads needs whole rows first.
"""

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import refused_by
from tokenweights._typing import typed
from tokenweights.attention.checks import check_exchange, check_shape
from tokenweights.attention.columns import attention_received, attention_received_varlen
from tokenweights.attention.layout import packed_batch, padded_batch
from tokenweights.attention.packed import packed_slice
from tokenweights.attention.parallel import (
    all_heads,
    check_own,
    dealt_blocks,
    row_runs,
    seen_keys,
    whole_keys,
)
from tokenweights.attention.received import (
    Horizon,
    Received,
    Reduction,
    batch_counts,
    check_received,
    finished,
)
from tokenweights.attention.statistics import Request
from tokenweights.attention.sweeps import HeadNumbers, averaged, check_chosen
from tokenweights.distributed import (
    agreed,
    agreement,
    gathered_on,
    global_sum,
    largest_of,
)
from tokenweights.masked import accumulator_dtype

_REQUEST = Request(("row_mass",))


@agreed
@typed
@torch.no_grad()
def sequence_parallel_received(
    query: Float[Tensor, "batch heads token dim"],
    key: Float[Tensor, "batch kv_heads token dim"],
    positions: Int[Tensor, " token"],
    *,
    group: dist.ProcessGroup | None = None,
    horizon: Horizon = (None, None),
    reduction: Reduction = "mean",
    rows: Bool[Tensor, "batch token"] | None = None,
    heads: HeadNumbers = None,
    key_mask: Bool[Tensor, "batch token"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch token"]:
    """Attention that this rank's tokens get from the queries of all ranks, `batch token`.

    The numbers of `attention_received` of the whole sequence. Keys travel once, as in
    `sequence_parallel_entropy`; then the columns that the ranks' queries gave are added up, see
    `received_bytes`. No gradient.

    Args:
        query: As in `sequence_parallel_entropy`.
        key: As in `sequence_parallel_entropy`.
        positions: As in `sequence_parallel_entropy`.
        group: As in `sequence_parallel_entropy`.
        horizon: As in `attention_received`.
        reduction: As in `attention_received`.
        rows: True at this rank's queries that count; None if all of all ranks do.
        heads: Numbers of the query heads that are averaged; None for all.
        key_mask: As in `sequence_parallel_entropy`.
        scale: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: As in `attention_received`.

    Returns:
        What this rank's tokens receive, in their order, float32.

    Raises:
        TokenWeightsError: As `attention_received`, or if positions are not a permutation.

    Example:
        >>> query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
        >>> order = torch.tensor([2, 0, 1])
        >>> sequence_parallel_received(query, key, order, reduction="sum")
        tensor([[0.3333, 1.8333, 0.8333]])
    """
    function, received = "sequence_parallel_received", Received(horizon, reduction)
    check_own(function, query, key, _REQUEST, key_mask, scale, window, softcap, sinks)
    check_received(function, received)
    check_shape(function, "rows", rows, (query.shape[0], query.shape[2]))
    keys, mask = whole_keys(function, key, positions, key_mask, group)
    parts = _empty(query.shape[0], keys.shape[2], query.device)
    with agreement(function, group), refused_by(function):
        for own, seen in row_runs(positions):
            part = _columns(
                query[:, :, own],
                keys[:, :, :seen],
                received,
                key_mask=None if mask is None else mask[:, :seen],
                rows=None if rows is None else rows[:, own],
                heads=heads,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
            )
            _add(parts[..., :seen], part, received)
    return _merged(parts, received, group)[:, positions].float()


@agreed
@typed
@torch.no_grad()
def packed_received(
    query: Float[Tensor, "token heads dim"],
    key: Float[Tensor, "token kv_heads dim"],
    position_ids: Int[Tensor, " token"],
    *,
    group: dist.ProcessGroup | None = None,
    horizon: Horizon = (None, None),
    reduction: Reduction = "mean",
    rows: Bool[Tensor, " token"] | None = None,
    heads: HeadNumbers = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, " token"]:
    """Attention that each token of a packed row gets within its own sequence, ` token`.

    The numbers of `attention_received_varlen` of the whole row, of which each rank may hold a
    slice, as in `packed_entropy`; what the queries of a slice give to keys of another is added up
    there. No gradient.

    Args:
        query: As in `packed_entropy`.
        key: As in `packed_entropy`.
        position_ids: As in `packed_entropy`.
        group: As in `packed_entropy`.
        horizon: As in `attention_received`.
        reduction: As in `attention_received`.
        rows: True at this rank's queries that count; None if all of all ranks do.
        heads: Numbers of the query heads that are averaged; None for all.
        scale: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: As in `attention_received`.

    Returns:
        What this rank's tokens receive, float32.

    Raises:
        TokenWeightsError: As `attention_received` and `packed_entropy`.

    Example:
        >>> query, key = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8)
        >>> packed_received(query, key, torch.tensor([0, 0, 1, 2]), reduction="sum")
        tensor([1.0000, 1.8333, 0.8333, 0.3333])
    """
    function, received = "packed_received", Received(horizon, reduction)
    own = query.transpose(0, 1)[None], key.transpose(0, 1)[None]
    check_own(function, *own, _REQUEST, None, scale, window, softcap, sinks)
    check_received(function, received)
    check_shape(function, "rows", rows, (len(query),))
    held = packed_slice(key, position_ids, group)
    parts = _empty(1, len(held.key), query.device)
    with agreement(function, group), refused_by(function):
        bounds = held.bounds(function)
        if len(query):
            edges = bounds.clamp(min=held.first) - held.first, bounds - bounds[0]
            reached = slice(int(bounds[0]), held.last)
            totals = attention_received_varlen(
                query,
                held.key[reached],
                cu_seqlens_q=edges[0],
                cu_seqlens_k=edges[1],
                horizon=horizon,
                reduction="max" if reduction == "max" else "sum",
                rows=rows,
                heads=averaged(heads),
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
            )
            q_bounds, k_bounds = (edge.tolist() for edge in edges)
            batch = packed_batch(query, held.key[reached], q_bounds, k_bounds, None, rows)
            counts = batch_counts(batch, received, causal=True)
            _add(parts[..., reached], torch.stack([totals[None].to(counts), counts]), received)
    return _merged(parts, received, group)[0, held.first : held.last].float()


@agreed
@typed
@torch.no_grad()
def tensor_parallel_received(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    *,
    group: dist.ProcessGroup | None = None,
    horizon: Horizon = (None, None),
    reduction: Reduction = "mean",
    rows: Bool[Tensor, "batch query"] | None = None,
    heads: HeadNumbers = None,
    key_mask: Bool[Tensor, "batch key"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch key"]:
    """Attention that every key gets where each rank holds some heads, the same on every rank.

    Columns of the heads are averaged: nothing else travels, see `received_bytes`. For `max` the
    rows have to be whole, and are dealt out as `tensor_parallel_entropy` does with `"rows"`. No
    gradient.

    Args:
        query: As in `tensor_parallel_entropy`.
        key: As in `tensor_parallel_entropy`.
        group: As in `tensor_parallel_entropy`.
        horizon: As in `attention_received`.
        reduction: As in `attention_received`.
        rows: As in `attention_received`, the same on every rank.
        heads: Numbers of the query heads that are averaged, counted over all ranks; None for all.
        key_mask: As in `tensor_parallel_entropy`.
        scale: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: Sinks of this rank's heads; see `attention_received`.

    Returns:
        What each key receives, float32.

    Raises:
        TokenWeightsError: As `attention_received`.

    Example:
        >>> query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
        >>> tensor_parallel_received(query, key, reduction="sum")
        tensor([[1.8333, 0.8333, 0.3333]])
    """
    function, received = "tensor_parallel_received", Received(horizon, reduction)
    check_own(function, query, key, _REQUEST, key_mask, scale, window, softcap, sinks)
    check_received(function, received)
    check_shape(function, "rows", rows, (query.shape[0], query.shape[2]))
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    options = {"scale": scale, "window": window, "softcap": softcap}
    chosen = range(query.shape[1] * ranks) if heads is None else heads
    parts = _empty(query.shape[0], key.shape[2], query.device)
    if reduction == "max":
        keys = all_heads(key, 1, group)
        sinks = None if sinks is None else all_heads(sinks, 0, group)
        owned = [
            (block, gathered_on(owner, query[:, :, block], dim=1, group=group))
            for owner, block in dealt_blocks(query.shape[2], ranks)
        ]
        with agreement(function, group), refused_by(function):
            for block, part in owned:
                if part is None:
                    continue
                seen = seen_keys(query, key, block)
                found = _columns(
                    part,
                    keys[:, :, :seen],
                    received,
                    key_mask=None if key_mask is None else key_mask[:, :seen],
                    rows=None if rows is None else rows[:, block],
                    heads=heads,
                    sinks=sinks,
                    **options,
                )
                _add(parts[..., :seen], found, received)
        return _merged(parts, received, group).float()
    first = rank * query.shape[1]
    mine = [head - first for head in chosen if first <= head < first + query.shape[1]]
    averaged = None if heads is None else mine
    with agreement(function, group), refused_by(function):
        check_chosen(function, chosen, query.shape[1] * ranks)
        if mine:
            parts = _columns(
                query,
                key,
                received,
                key_mask=key_mask,
                rows=rows,
                heads=averaged,
                sinks=sinks,
                **options,
            )
            parts[0] *= len(mine) / len(chosen)
    # Every rank has the same queries: their number is not added up.
    counts = parts[1].clone() if mine else torch.zeros_like(parts[1])
    totals = global_sum(parts[0], group=group)
    return finished(received, totals, largest_of(counts, group=group)).float()


@typed
def received_bytes(*, batch: int, keys: int, ranks: int) -> int:
    """Bytes of columns that ranks exchange to add them up, per rank.

    A total and a count in float64 for each key, in one reduction that sends and receives each
    number twice over all ranks, as a ring does. `sequence_parallel_received` and `packed_received`
    move the keys as well (`sequence_parallel_bytes`), `tensor_parallel_received` nothing else,
    but for `max` what `tensor_parallel_bytes` says for rows.

    Args:
        batch: Rows of the batch.
        keys: Tokens of the whole sequence.
        ranks: Ranks that share it.

    Returns:
        Bytes.

    Example:
        >>> received_bytes(batch=1, keys=16384, ranks=8)
        458752
    """
    check_exchange("received_bytes", ranks={"ranks": ranks}, batch=batch, keys=keys)
    return 2 * (ranks - 1) * batch * keys * 2 * 8 // ranks


def _empty(batch: int, keys: int, device: torch.device) -> Float[Tensor, "part batch key"]:
    """No totals and no counts."""
    return torch.zeros(2, batch, keys, dtype=accumulator_dtype(device), device=device)


def _columns(
    query: Tensor,
    key: Tensor,
    received: Received,
    *,
    key_mask: Tensor | None,
    rows: Tensor | None,
    heads: HeadNumbers,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Float[Tensor, "part batch key"]:
    """Totals and counts of some queries."""
    totals = attention_received(
        query,
        key,
        horizon=received.horizon,
        reduction="max" if received.reduction == "max" else "sum",
        rows=rows,
        heads=averaged(heads),
        key_mask=key_mask,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    batch = padded_batch(query, key, key_mask, None, rows)
    counts = batch_counts(batch, received, causal=True)
    return torch.stack([totals.to(counts), counts])


def _add(parts: Tensor, part: Tensor, received: Received) -> None:
    """Put what some queries gave to what others did, in place."""
    if received.reduction == "max":
        torch.maximum(parts[0], part[0], out=parts[0])
        parts[1] += part[1]
    else:
        parts += part


def _merged(
    parts: Tensor, received: Received, group: dist.ProcessGroup | None
) -> Float[Tensor, "batch key"]:
    if received.reduction == "max":
        return largest_of(parts[0], group=group)
    totals, counts = global_sum(parts, group=group)
    return finished(received, totals, counts)
