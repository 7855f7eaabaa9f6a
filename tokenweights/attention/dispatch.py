"""Which implementation computes a sweep over unpadded sequences, and the checks around it."""

from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights.attention.checks import check_batch_scores, check_results, check_total_mass
from tokenweights.attention.chunked import (
    WORKSPACE_BYTES,
    Workspace,
    reads_first_keys,
    sequence_statistics,
    sequences_per_tile,
)
from tokenweights.attention.layout import TokenBatch, TokenSequence, sequence_stacks
from tokenweights.attention.received import asked_queries, check_columns
from tokenweights.attention.received_chunked import column_sums
from tokenweights.attention.received_reference import reference_received
from tokenweights.attention.reference import reference_statistics
from tokenweights.attention.results import write_results
from tokenweights.attention.scores import ACCELERATOR_FLOAT32_SCORE, score_range
from tokenweights.attention.statistics import Logits, Request
from tokenweights.attention.triton_configuration import triton_refusal
from tokenweights.masked import accumulator_dtype

Backend = Literal["auto", "chunked", "reference", "triton"]
UsedBackend = Literal["chunked", "reference", "triton"]

# Above this, the rounding of a float32 logarithm is an error of its weights that shows.
COARSE_LSE = 256.0


def backend_used(function: str, backend: Backend, query: Tensor, key: Tensor) -> UsedBackend:
    """The implementation behind a `backend` argument; `auto` takes Triton for what it can serve."""
    if backend == "auto":
        serves = query.device.type == "cuda" and triton_refusal(query, key) is None
        return "triton" if serves else "chunked"
    if backend == "triton" and (refusal := triton_refusal(query, key)) is not None:
        hint = f'Here {refusal}; pass "chunked" or "auto".'
        raise invalid(function, "backend", "to serve these tensors", '"triton"', hint)
    return backend


def sweep(
    function: str,
    backend: UsedBackend,
    batch: TokenBatch,
    request: Request,
    logits: Logits,
    results: dict[str, Tensor],
    *,
    per_head: bool,
    sinks: Float[Tensor, " heads"] | None,
    workspace_bytes: int,
) -> None:
    """Write the statistics of all sequences into `results`.

    Args:
        function: Public name for error messages.
        backend: Which implementation, `chunked` or `triton`.
        batch: Queries, keys and sequences without padding.
        request: What to compute.
        logits: How scores become logits.
        results: `batch heads query` per kind, with a single head unless `per_head`; the totals of
            what keys receive, `batch heads key`, where that is asked.
        per_head: Keep heads apart instead of averaging their distributions.
        sinks: Extra logits in the denominator.
        workspace_bytes: Bound on the weights that are held at a time.
    """
    if not batch.sequences:
        return
    run = chunked_sweep
    if backend == "triton" and _in_float32(batch, logits.scale):
        # Imported when needed: triton is large, and not everywhere.
        from tokenweights.attention.triton_backend import triton_sweep as run
    run(
        function,
        batch,
        request,
        logits,
        results,
        per_head=per_head,
        sinks=sinks,
        workspace_bytes=workspace_bytes,
    )


def chunked_sweep(
    function: str,
    batch: TokenBatch,
    request: Request,
    logits: Logits,
    results: dict[str, Tensor],
    *,
    per_head: bool,
    sinks: Float[Tensor, " heads"] | None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> None:
    """As `sweep`, in plain torch: a sequence at a time, or short ones of equal lengths at once."""
    workspace = Workspace(batch.query.device)
    heads = batch.query.shape[1]

    def most(sequence: TokenSequence) -> int:
        if request.received is not None:  # columns are summed sequence by sequence
            return 1
        queries, keys = sequence.query.shape[1], sequence.key.shape[1]
        return sequences_per_tile(
            heads=heads, queries=queries, keys=keys, device=batch.query.device
        )

    totals: list[Tensor] = []
    for stack in sequence_stacks(batch.sequences, most):
        query, key, lse, sequences = stack.query, stack.key, stack.lse, len(stack.sequences)
        stack_sinks = None if sinks is None else sinks.repeat(sequences)
        statistics = partial(
            sequence_statistics,
            logits=logits,
            sequences=sequences,
            workspace=workspace,
            workspace_bytes=workspace_bytes,
            function=function,
        )
        asked, first = request, stack.sequences[0]
        coarse = lse is not None and _is_coarse(lse)
        if lse is not None and (coarse or reads_first_keys(request, lse)):
            # The sweep will not sum whole rows with this lse: some are summed for the check.
            rows = slice(None) if coarse else slice(-1, None)
            checked, known = query[:, rows], lse[:, rows]
            found = statistics(checked, key, request.only("row_mass"), per_head=True, lse=known)
            totals.append(found["row_mass"] + _sink_share(stack_sinks, known))
            lse = None if coarse else lse
        elif lse is not None:
            asked = request.only(*dict.fromkeys((*request.kinds, "row_mass")))
        columns = None
        if request.received is not None:
            columns = column_sums(
                request.received,
                first.asked,
                heads=heads if per_head else 1,
                queries=query.shape[1],
                keys=key.shape[1],
                device=query.device,
            )
        found = statistics(
            query, key, asked, per_head=per_head, sinks=stack_sinks, lse=lse, columns=columns
        )
        if columns is not None:
            check_results(function, {"row_mass": columns.rows})
            mass = float(columns.sums.sum()), float(columns.rows.sum())
            check_columns(function, *mass, asked_queries(first) * len(columns.rows))
            results["received"][first.slots.row][:, first.slots.key] = columns.totals
        if lse is not None and "row_mass" in found:
            share = _sink_share(stack_sinks, lse)
            share = share if per_head else share.unflatten(0, (sequences, heads)).mean(1)
            totals.append(found["row_mass"] + share)
        for index, sequence in enumerate(stack.sequences):
            own = {kind: found[kind].unflatten(0, (sequences, -1))[index] for kind in request.kinds}
            write_results(results, own, sequence.slots)
    if totals:
        check_total_mass(function, torch.cat([total.flatten() for total in totals]))


def packed_reference(
    function: str,
    batch: TokenBatch,
    request: Request,
    logits: Logits,
    results: dict[str, Tensor],
    *,
    per_head: bool,
    sinks: Float[Tensor, " heads"] | None,
) -> None:
    """Write the reference's statistics of each sequence alone into `results`."""
    check_batch_scores(function, batch, logits.scale)
    for sequence in batch.sequences:
        found = reference_statistics(
            sequence.query[None],
            sequence.key[None],
            request,
            logits,
            per_head=per_head,
            sinks=sinks,
            lse=None if sequence.lse is None else sequence.lse[None],
            function=function,
        )
        write_results(results, {kind: value[0] for kind, value in found.items()}, sequence.slots)
        if request.received is not None:
            totals, *mass = reference_received(
                sequence.query[None],
                sequence.key[None],
                request.received,
                logits,
                key_mask=None,
                sinks=sinks,
                per_head=per_head,
                rows=None if sequence.asked is None else sequence.asked[None],
            )
            columns, rows = map(float, mass)
            check_columns(function, columns, rows, asked_queries(sequence) * totals.shape[1])
            results["received"][sequence.slots.row][:, sequence.slots.key] = totals[0]


def _in_float32(batch: TokenBatch, scale: float) -> bool:
    """Whether kernels that multiply in float32 resolve all scores of the batch."""
    limit = ACCELERATOR_FLOAT32_SCORE
    if all(score_range(batch.query, batch.key, scale).in_float32(limit)):
        return True
    # Padding may hold anything: only then the sequences are looked at one by one.
    ranges = (score_range(part.query, part.key, scale) for part in batch.sequences)
    return all(all(scores.in_float32(limit)) for scores in ranges)


def _is_coarse(lse: Float[Tensor, "heads query"]) -> bool:
    return lse.dtype == torch.float32 and bool((lse.abs() > COARSE_LSE).any())


def _sink_share(
    sinks: Float[Tensor, " heads"] | None, lse: Float[Tensor, "heads query"]
) -> Float[Tensor, "heads query"]:
    """The mass that the sinks take, per row; what is missing from 1 otherwise is an error."""
    if sinks is None:
        return torch.zeros_like(lse, dtype=torch.float32)
    wide = accumulator_dtype(lse.device)
    return (sinks.to(wide)[:, None] - lse.to(wide)).exp().float()
