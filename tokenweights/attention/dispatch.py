"""Which implementation computes a sweep over unpadded sequences, and the checks around it."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights.attention.checks import check_total_mass
from tokenweights.attention.chunked import Workspace, reads_first_keys, sequence_statistics
from tokenweights.attention.layout import TokenSequence
from tokenweights.attention.reference import reference_statistics
from tokenweights.attention.results import write_results
from tokenweights.attention.statistics import Logits, Request

Backend = Literal["auto", "chunked", "reference", "triton"]


def backend_used(function: str, backend: Backend) -> Literal["chunked", "reference"]:
    """The implementation behind a `backend` argument; `auto` is `chunked` on every device."""
    if backend == "triton":
        hint = 'This build has no Triton kernels; pass "chunked" or "auto".'
        raise invalid(function, "backend", "to be auto, chunked or reference", '"triton"', hint)
    return "reference" if backend == "reference" else "chunked"


def sweep(
    function: str,
    sequences: Sequence[TokenSequence],
    request: Request,
    logits: Logits,
    results: dict[str, Tensor],
    *,
    per_head: bool,
    sinks: Float[Tensor, " heads"] | None,
) -> None:
    """Write the statistics of all sequences into `results`, with the chunked implementation.

    Args:
        function: Public name for error messages.
        sequences: Sequences without padding.
        request: What to compute.
        logits: How scores become logits.
        results: `batch heads query` per kind, with a single head unless `per_head`.
        per_head: Keep heads apart instead of averaging their distributions.
        sinks: Extra logits in the denominator.
    """
    if not sequences:
        return
    workspace = Workspace(sequences[0].query.device)
    totals: list[Tensor] = []
    for sequence in sequences:
        query, key, lse = sequence.query, sequence.key, sequence.lse
        asked = request
        if lse is not None and reads_first_keys(request, lse):
            # The sweep will not see whole rows: one row per sequence is summed for the check.
            last = sequence_statistics(
                query[:, -1:],
                key,
                request.only("row_mass"),
                logits,
                per_head=True,
                lse=lse[:, -1:],
                workspace=workspace,
            )
            totals.append(last["row_mass"] + _sink_share(sinks, lse[:, -1:], per_head=True))
        elif lse is not None:
            asked = request.only(*dict.fromkeys((*request.kinds, "row_mass")))
        found = sequence_statistics(
            query,
            key,
            asked,
            logits,
            per_head=per_head,
            sinks=sinks,
            lse=lse,
            workspace=workspace,
        )
        if lse is not None and "row_mass" in found:
            totals.append(found["row_mass"] + _sink_share(sinks, lse, per_head=per_head))
        write_results(results, {kind: found[kind] for kind in request.kinds}, sequence.slots)
    if totals:
        check_total_mass(function, torch.cat([total.flatten() for total in totals]))


def packed_reference(
    sequences: Sequence[TokenSequence],
    request: Request,
    logits: Logits,
    results: dict[str, Tensor],
    *,
    per_head: bool,
    sinks: Float[Tensor, " heads"] | None,
) -> None:
    """Write the reference's statistics of each sequence alone into `results`."""
    for sequence in sequences:
        found = reference_statistics(
            sequence.query[None],
            sequence.key[None],
            request,
            logits,
            per_head=per_head,
            sinks=sinks,
        )
        write_results(results, {kind: value[0] for kind, value in found.items()}, sequence.slots)


def _sink_share(
    sinks: Float[Tensor, " heads"] | None,
    lse: Float[Tensor, "heads query"],
    *,
    per_head: bool,
) -> Float[Tensor, "heads query"]:
    """The mass that the sinks take, per row; what is missing from 1 otherwise is an error."""
    if sinks is None:
        share = torch.zeros_like(lse, dtype=torch.float32)
    else:
        share = (sinks.float()[:, None] - lse.float()).exp()
    return share if per_head else share.mean(0, keepdim=True)
