"""From the arguments of a public function to its results: checks, layout, one sweep, assembly."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights.attention.checks import (
    check_batch_scores,
    check_bounds,
    check_finite,
    check_heads,
    check_logits,
    check_padded,
    check_positions,
    check_request,
    check_results,
    check_shape,
    check_workspace,
)
from tokenweights.attention.dispatch import Backend, backend_used, packed_reference, sweep
from tokenweights.attention.layout import TokenBatch, packed_batch, padded_batch
from tokenweights.attention.received import batch_counts, finished
from tokenweights.attention.reference import reference_statistics
from tokenweights.attention.results import empty_results, over_heads
from tokenweights.attention.statistics import Heads, Logits, Request

# How heads are put together: as `Heads` says, or the mean distribution of the ones that are listed.
SomeHeads = Heads | Sequence[int]
# Numbers of the query heads that are averaged; None for all.
HeadNumbers = Sequence[int] | None


def averaged(heads: HeadNumbers) -> SomeHeads:
    """The mean distribution of these heads, or of all."""
    return "mean_distribution" if heads is None else heads


def padded_statistics(
    function: str,
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    request: Request,
    logits: Logits,
    *,
    key_mask: Bool[Tensor, "batch key"] | None,
    sinks: Float[Tensor, " heads"] | None,
    lse: Float[Tensor, "batch heads query"] | None,
    heads: SomeHeads,
    backend: Backend,
    workspace_bytes: int,
    rows: Bool[Tensor, "batch query"] | None = None,
) -> dict[str, Tensor]:
    """The statistics of a padded batch, `batch query` or `batch heads query` each.

    Args:
        function: Public name for error messages.
        query: As in `attention_entropy`.
        key: As in `attention_entropy`.
        request: What to compute.
        logits: How scores become logits.
        key_mask: As in `attention_entropy`.
        sinks: As in `attention_entropy`.
        lse: As in `attention_entropy`.
        heads: As in `attention_entropy`, or the numbers of the heads that are averaged.
        backend: As in `attention_entropy`.
        workspace_bytes: As in `attention_entropy`.
        rows: True at queries that count towards what keys receive; None if all do.

    Returns:
        One tensor per kind, and `received`, `batch key` or `batch heads key`, where it is asked.
    """
    check_padded(function, query, key, key_mask, lse, sinks)
    check_shape(function, "rows", rows, (query.shape[0], query.shape[2]))
    whole_lse = lse
    if not isinstance(heads, str):
        query, key, sinks = chosen_heads(function, heads, query, key, sinks)
        lse = None if whole_lse is None else whole_lse[:, list(heads)]
        heads = "mean_distribution"
    check_request(function, request, heads)
    check_logits(function, logits)
    check_workspace(function, workspace_bytes)
    batch = padded_batch(query, key, key_mask, lse, rows)
    check_finite(function, batch, sinks)
    request, logits = request.bounded(key.shape[2]), logits.bounded(key.shape[2])
    per_head = heads != "mean_distribution"
    used = backend_used(function, backend, query, key)
    if used == "reference" and batch.sequences and request.received is None:
        check_batch_scores(function, batch, logits.scale)
        results = reference_statistics(
            query,
            key,
            request,
            logits,
            key_mask=key_mask,
            sinks=sinks,
            per_head=per_head,
            lse=lse,
            function=function,
        )
        check_results(function, results)
        return over_heads(results, heads)
    return _swept(
        function,
        used,
        batch,
        request,
        logits,
        heads=heads,
        sinks=sinks,
        workspace_bytes=workspace_bytes,
    )


def packed_statistics(
    function: str,
    query: Float[Tensor, "total_q heads dim"],
    key: Float[Tensor, "total_k kv_heads dim"],
    request: Request,
    logits: Logits,
    *,
    cu_seqlens_q: Int[Tensor, " boundary"],
    cu_seqlens_k: Int[Tensor, " boundary"],
    sinks: Float[Tensor, " heads"] | None,
    lse: Float[Tensor, "heads total_q"] | None,
    heads: SomeHeads,
    backend: Backend,
    workspace_bytes: int,
    rows: Bool[Tensor, " total_q"] | None = None,
) -> dict[str, Tensor]:
    """The statistics of a packed batch, ` total_q` or `heads total_q` each; see above."""
    check_heads(
        function,
        heads=query.shape[1],
        kv_heads=key.shape[1],
        dim=query.shape[2],
        key_dim=key.shape[2],
        sinks=sinks,
    )
    check_shape(function, "lse", lse, (query.shape[1], query.shape[0]))
    check_shape(function, "rows", rows, (query.shape[0],))
    check_shape(function, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape))
    query_bounds, key_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    check_bounds(function, "cu_seqlens_q", query_bounds, query.shape[0])
    check_bounds(function, "cu_seqlens_k", key_bounds, key.shape[0])
    whole_lse = lse
    if not isinstance(heads, str):
        query, key, sinks = chosen_heads(function, heads, query, key, sinks)
        lse = None if whole_lse is None else whole_lse[list(heads)]
        heads = "mean_distribution"
    batch = packed_batch(query, key, query_bounds, key_bounds, lse, rows)
    for sequence in batch.sequences:
        check_positions(function, sequence.query.shape[1], sequence.key.shape[1])
    check_request(function, request, heads)
    check_logits(function, logits)
    check_workspace(function, workspace_bytes)
    check_finite(function, batch, sinks)
    results = _swept(
        function,
        backend_used(function, backend, query, key),
        batch,
        request.bounded(key.shape[0]),
        logits.bounded(key.shape[0]),
        heads=heads,
        sinks=sinks,
        workspace_bytes=workspace_bytes,
    )
    return {kind: value[0] for kind, value in results.items()}


def chosen_heads(
    function: str,
    heads: Sequence[int],
    query: Float[Tensor, "rows heads *positions"],
    key: Float[Tensor, "rows kv_heads *positions"],
    sinks: Float[Tensor, " heads"] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries, keys and sinks of some query heads, each with a key head of its own.

    Args:
        function: Public name for error messages.
        heads: Their numbers, each once.
        query: Queries of all heads.
        key: Keys of all heads.
        sinks: Sinks of all heads.

    Returns:
        The three, with as many key heads as query heads.
    """
    every = query.shape[1]
    check_chosen(function, heads, every)
    chosen = torch.tensor(list(heads), device=query.device)
    shared = chosen // (every // key.shape[1])
    taken = None if sinks is None else sinks[chosen.to(sinks.device)]
    return query.index_select(1, chosen), key.index_select(1, shared), taken


def check_chosen(function: str, heads: Sequence[int], every: int) -> None:
    """Refuse numbers of heads that there are not, and none."""
    fits = all(0 <= head < every for head in heads)
    if not len(heads) or not fits or len(set(heads)) < len(heads):
        condition = f"to be numbers from 0 to {every - 1}, each once and at least one"
        raise invalid(function, "heads", condition, list(heads), "Name heads of this layer.")


def _swept(
    function: str,
    used: str,
    batch: TokenBatch,
    request: Request,
    logits: Logits,
    *,
    heads: Heads,
    sinks: Tensor | None,
    workspace_bytes: int,
) -> dict[str, Tensor]:
    per_head = heads != "mean_distribution"
    rows, all_heads, queries, _ = batch.query.shape
    shape = (rows, all_heads if per_head else 1, queries)
    options = {"per_head": per_head, "sinks": sinks}
    if used == "reference":
        results = empty_results(request, shape, batch.query, torch.float64)
    else:
        results = empty_results(request, shape, batch.query)
    received, counts = request.received, None
    if received is not None:
        counts = batch_counts(batch, received, causal=logits.causal)[:, None]
        results["received"] = counts.new_zeros(*shape[:2], batch.key.shape[2])
    if used == "reference":
        packed_reference(function, batch, request, logits, results, **options)
    else:
        sweep(
            function,
            "triton" if used == "triton" else "chunked",
            batch,
            request,
            logits,
            results,
            **options,
            workspace_bytes=workspace_bytes,
        )
    check_results(function, results)
    if received is not None:
        assert counts is not None
        whole = finished(received, results["received"], counts)
        results["received"] = whole if used == "reference" else whole.float()
    return over_heads(results, heads)
