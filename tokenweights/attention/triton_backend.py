"""The Triton kernels on a whole batch: launches, and what becomes of the row sums.

One launch covers all sequences. Log-sum-exps come first unless given; then one pass of products
per statistic sweep. Where weights must be ordered, they are written to a bounded workspace, some
rows at a time, and selected from there.
"""

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tokenweights.attention import triton_kernels
from tokenweights.attention.checks import check_results, check_total_mass
from tokenweights.attention.chunked import reads_first_keys, sequence_statistics
from tokenweights.attention.layout import Slots, TokenBatch, TokenSequence
from tokenweights.attention.results import write_results
from tokenweights.attention.rows import TINY
from tokenweights.attention.statistics import Logits, Request
from tokenweights.attention.triton_configuration import (
    Configuration,
    Tiles,
    block_dim,
    shipped_configuration,
)
from tokenweights.attention.triton_received import triton_received
from tokenweights.attention.triton_work import (
    MOST_PARTS,
    affordable_rows,
    item_table,
    part_span,
    result_starts,
    row_counts,
    sequence_table,
    unit_table,
    widths,
    with_sum_rows,
    workspace_chunks,
)

# Type checkers do not know that a kernel takes launch options.
_KERNELS: Any = triton_kernels
# Rows that hold less than this are computed again from logarithms, by the chunked backend.
FAINT_MASS = 1e-30
# With `fixed` alone, the given lse is verified on the last rows of each sequence.
LAST_ROWS = 16
LINEAR = {"mean_distance", "local_mass", "nonlocal_mass", "max_weight"}
SELECTED = {"topk", "support_size"}


def triton_sweep(
    function: str,
    batch: TokenBatch,
    request: Request,
    logits: Logits,
    results: dict[str, Tensor],
    *,
    per_head: bool,
    sinks: Float[Tensor, " heads"] | None,
    workspace_bytes: int,
    configuration: Configuration | None = None,
) -> None:
    """Write the statistics of all sequences into `results`.

    Args:
        function: Public name for error messages.
        batch: Queries, keys and sequences without padding.
        request: What to compute.
        logits: How scores become logits.
        results: `batch heads query` per kind, with a single head unless `per_head`.
        per_head: Keep heads apart instead of averaging their distributions.
        sinks: Extra logits in the denominator.
        workspace_bytes: Bound on the weights that are held at a time.
        configuration: Tile sizes and the like; by default what is shipped for the device.
    """
    contiguous = all(isinstance(sequence.slots.key, slice) for sequence in batch.sequences)
    dense = batch if contiguous else _gathered(batch)
    # A launch goes to the current device, which need not be that of the tensors.
    with torch.cuda.device(dense.query.device) if dense.query.is_cuda else nullcontext():
        swept = _Sweep(
            dense,
            request,
            logits,
            per_head,
            None if sinks is None else sinks.float().contiguous(),
            workspace_bytes,
            configuration
            or shipped_configuration(dense.query, dense.key, softcap=logits.softcap is not None),
        )
        # A given lse is verified by the mass of the rows, whatever is asked.
        rows_asked = bool(request.kinds) or swept.lse_given
        found, mass, asked = swept.statistics(function) if rows_asked else ({}, None, None)
        if request.received is not None:
            totals = triton_received(function, swept, dense, request.received)
            for packed, sequence in zip(dense.sequences, batch.sequences, strict=True):
                own = totals[packed.slots.row][:, packed.slots.key].to(results["received"])
                results["received"][sequence.slots.row][:, sequence.slots.key] = own
    if not contiguous:
        for packed, sequence in zip(dense.sequences, batch.sequences, strict=True):
            one = {kind: value[0][:, packed.slots.query] for kind, value in found.items()}
            write_results(results, one, sequence.slots)
    else:
        for kind, value in found.items():
            results[kind].copy_(value)
    if not request.kinds or (sinks is None and "fixed" not in request.kinds):
        return
    assert mass is not None and asked is not None
    faint = asked & ~(mass > FAINT_MASS)
    if bool(faint.any()):
        _repair(faint, dense, batch, request, logits, results, per_head=per_head, sinks=sinks)


class _Sweep:
    """The tensors of one call in the form that kernels take them."""

    def __init__(
        self,
        batch: TokenBatch,
        request: Request,
        logits: Logits,
        per_head: bool,
        sinks: Float[Tensor, " heads"] | None,
        workspace_bytes: int,
        configuration: Configuration,
    ):
        self.request, self.logits, self.sinks = request, logits, sinks
        self.workspace_bytes, self.configuration = workspace_bytes, configuration
        self.query, self.key = _readable(batch.query), _readable(batch.key)
        if logits.scale <= 0:
            # The kernels take the largest product of a row before they scale it.
            self.query = self.query * (-1 if logits.scale < 0 else 0)
            self.logits = replace(logits, scale=-logits.scale or 1.0)
        rows, heads, self.query_slots, self.dim = self.query.shape
        self.device, self.heads, self.batch = self.query.device, heads, rows
        self.all_rows = rows * self.query_slots
        self.group = heads // self.key.shape[1]
        self.out_heads = heads if per_head else 1
        self.sequences_host = sequence_table(list(batch.sequences))
        self.sequences = self._on_device(self.sequences_host)
        self.lse_given = batch.lse is not None
        if batch.lse is None:
            self.lse = self._denominators()
        else:
            lse = batch.lse.float().transpose(0, 1)
            self.lse = lse.reshape(heads, self.all_rows).contiguous()

    def statistics(
        self, function: str
    ) -> tuple[dict[str, Tensor], Float[Tensor, "b h q"], Bool[Tensor, "b h q"]]:
        """Statistics as `batch heads query`, the mass that must not be faint, and real rows."""
        first_only = self.lse_given and reads_first_keys(self.request, self.lse)
        fixed_k = self.request.fixed_k if first_only else None
        if SELECTED & set(self.request.kinds):
            sums, selected = self._selected()
        else:
            units = self._units(self._tiles_of(self.request).rows, fixed_k=fixed_k)
            sums, selected = self._row_sums(units, self.request), {}
        real = sums[7] > 0
        mass = sums[0]
        if first_only:
            self._check_last_rows(function)
        elif self.lse_given:
            self._check_mass(function, sums)
        check_results(function, {"row_mass": mass})
        found = self._from_sums(sums) | selected
        found = {
            kind: self._batched(torch.where(_like(real, found[kind]), found[kind], 0))
            for kind in self.request.kinds
        }
        if "fixed" in self.request.kinds:
            mass = torch.minimum(mass, sums[5])
        return found, self._batched(mass), self._batched(real)

    def _units(self, rows: int, **restriction: int | bool | None) -> Int[Tensor, "unit column"]:
        return unit_table(
            self.sequences_host,
            self.logits,
            rows=rows,
            out_heads=self.out_heads,
            **restriction,  # pyright: ignore[reportArgumentType]
        )

    def _denominators(self) -> Float[Tensor, "heads row"]:
        tiles = self.configuration.denominators
        lse = torch.empty(self.heads, self.all_rows, dtype=torch.float32, device=self.device)
        units = unit_table(self.sequences_host, self.logits, rows=tiles.rows)
        _KERNELS.log_sum_exp[(len(units), self.heads)](
            self._loaded(self.query, tiles.rows),
            self._loaded(self.key, tiles.keys),
            self.sinks,
            lse,
            self.sequences,
            self._on_device(units),
            *self._strides(),
            self.query_slots,
            self.all_rows,
            self.group,
            *self._logit_parameters(),
            **self._constants(tiles),
        )
        return lse

    def _selected(self) -> tuple[Float[Tensor, "sum head row"], dict[str, Tensor]]:
        """Row sums, top-k entropy and support sizes, a workspace of weights at a time."""
        tiles = self.configuration.sums
        longest = int(widths(self._units(tiles.rows)).max())
        rows = affordable_rows(longest, tiles.rows, tiles.keys, self.workspace_bytes)
        units = self._units(rows)
        total = self._zeros(8, self.out_heads * self.all_rows)
        shares = self.request.support_mass if "support_size" in self.request.kinds else ()
        with_top_k = "topk" in self.request.kinds
        targets = with_top_k + len(shares)
        slots = 1 << max(targets - 1, 0).bit_length()
        rests = [0.0] * with_top_k + [1.0 - share for share in shares] + [0.0] * (slots - targets)
        rests = torch.tensor(rests, dtype=torch.float32, device=self.device)
        shape = (self.out_heads, self.all_rows)
        entropy = self._zeros(*shape)
        sizes = torch.zeros(*shape, len(shares), dtype=torch.int32, device=self.device)
        workspace = None
        for chunk, size in workspace_chunks(units, tiles.keys, self.workspace_bytes):
            if workspace is None or workspace.numel() < size:
                workspace = torch.empty(size, dtype=torch.float32, device=self.device)
            # Sums of this chunk alone: few rows, which may be cut into as many parts as keep the
            # device busy.
            count = row_counts(chunk)
            place = count.cumsum(0) - count
            size = int(count.sum())
            sums = self._part_sums(chunk, place, size, tiles, self.request, longest, workspace)
            start = (self._result_starts(chunk) - place).repeat_interleave(count)
            total[:, self._on_device(start + torch.arange(size))] = sums
            selection = self.configuration.selection(int(widths(chunk).max()), rows)
            _KERNELS.selections[(len(chunk), -(-rows // selection.rows))](
                workspace,
                rests,
                entropy,
                sizes,
                self.sequences,
                self._on_device(chunk),
                self.query_slots,
                self.all_rows,
                self.request.top_k if with_top_k else None,
                self.logits.window,
                TARGETS=targets,
                SLOTS=slots,
                CAUSAL=self.logits.causal,
                ROWS=selection.rows,
                BLOCK=selection.block,
                PIECES=selection.pieces,
                num_warps=selection.warps,
            )
        total = total.view(8, self.out_heads, self.all_rows)
        return total, {"topk": entropy, "support_size": sizes}

    def _row_sums(
        self, units: Int[Tensor, "unit column"], request: Request
    ) -> Float[Tensor, "sum head row"]:
        tiles = self._tiles_of(request)
        size = self.out_heads * self.all_rows
        place = self._result_starts(units)
        sums = self._part_sums(units, place, size, tiles, request, MOST_PARTS, None)
        return sums.view(8, self.out_heads, self.all_rows)

    def _result_starts(self, units: Int[Tensor, "unit column"]) -> Int[Tensor, " unit"]:
        return result_starts(units, self.sequences_host, self.query_slots, self.all_rows)

    def _part_sums(
        self,
        units: Int[Tensor, "unit column"],
        place: Int[Tensor, " unit"],
        size: int,
        tiles: Tiles,
        request: Request,
        most_parts: int,
        workspace: Float[Tensor, " weight"] | None,
    ) -> Float[Tensor, "sum row"]:
        """Row sums of units, put together from parts; each unit's rows begin at its place."""
        span = part_span(units, tiles.keys, most_parts)
        parts = -(-int(widths(units).max()) // span)
        sums = self._zeros(parts, 8, size)
        self._launch(tiles, item_table(with_sum_rows(units, place), span), request, sums, workspace)
        return _added(sums)

    def _tiles_of(self, request: Request) -> Tiles:
        few = set(request.kinds) <= {"raw", "normalized", "row_mass"}
        weights, sums = self.configuration.weights, self.configuration.sums
        # Long tiles of shared keys are for heads that can share them.
        return weights if few and not (weights.shared and self.out_heads > 1) else sums

    def _launch(
        self,
        tiles: Tiles,
        items: Int[Tensor, "item column"],
        request: Request,
        sums: Float[Tensor, "part sum row"],
        workspace: Float[Tensor, " weight"] | None,
    ) -> None:
        kinds = set(request.kinds)
        averaged = self.heads // self.out_heads
        _KERNELS.mean_weights[(len(items),)](
            self._loaded(self.query, tiles.rows),
            self._loaded(self.key, tiles.keys),
            self.lse,
            sums,
            workspace,
            self.sequences,
            self._on_device(items),
            *self._strides(),
            self.query_slots,
            self.all_rows,
            self.group,
            sums.shape[2],
            *self._logit_parameters(),
            request.fixed_k if "fixed" in kinds else None,
            request.local_window if kinds & LINEAR else None,
            request.distance_bound,
            HEADS=averaged,
            SHARED=self.group if tiles.shared and averaged % self.group == 0 else 1,
            OVERLAPPED=tiles.overlapped,
            **self._constants(tiles),
        )

    def _from_sums(self, sums: Float[Tensor, "sum head row"]) -> dict[str, Tensor]:
        mass, plogp, far, local, largest, fixed_mass, fixed_plogp, count = sums
        raw = _clamped(_entropy(mass, plogp), count)
        near = (local / mass).clamp_max(1.0)
        return {
            "raw": raw,
            # A single visible key has entropy 0 and log N_t = 0: the quotient is 0 by convention.
            "normalized": raw / count.log().clamp_min(TINY),
            "fixed": _clamped(
                _entropy(fixed_mass, fixed_plogp), count.clamp_max(self.request.fixed_k)
            ),
            "mean_distance": far / mass,
            "local_mass": near,
            "nonlocal_mass": 1.0 - near,
            "max_weight": largest / mass,
            "row_mass": mass,
        }

    def _check_mass(self, function: str, sums: Float[Tensor, "sum head row"]) -> None:
        """Refuse an lse under which some row, sink included, does not sum to one."""
        total = sums[0]
        if self.sinks is not None:
            share = (self.sinks[:, None] - self.lse).exp()
            total = total + (share if self.out_heads > 1 else share.mean(0, keepdim=True))
        check_total_mass(function, torch.where(sums[7] > 0, total, 1.0))

    def _check_last_rows(self, function: str) -> None:
        """The same for the last rows of each sequence, which is what `fixed` alone can afford."""
        units = self._units(LAST_ROWS, last_only=True)
        self._check_mass(function, self._row_sums(units, self.request.only("row_mass")))

    def _loaded(self, tensor: Tensor, rows: int) -> Tensor | TensorDescriptor:
        if not self.configuration.descriptors:
            return tensor
        block = [1, 1, rows, block_dim(self.dim)]
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)

    def _strides(self) -> tuple[tuple[int, ...] | None, ...]:
        """None where descriptors know them."""
        if self.configuration.descriptors:
            return None, None
        return self.query.stride()[:3], self.key.stride()[:3]

    def _logit_parameters(self) -> tuple[float, float | None, int | None]:
        return self.logits.scale, self.logits.softcap, self.logits.window

    def _constants(self, tiles: Tiles) -> dict[str, int | bool]:
        return {
            "DIM": self.dim,
            "BLOCK_ROWS": tiles.rows,
            "BLOCK_KEYS": tiles.keys,
            "BLOCK_DIM": block_dim(self.dim),
            "CAUSAL": self.logits.causal,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def _on_device(self, table: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return table
        return table.pin_memory().to(self.device, non_blocking=True)

    def _batched(self, value: Tensor) -> Tensor:
        """From `head row ...` to `batch head query ...`."""
        shape = (value.shape[0], self.batch, self.query_slots, *value.shape[2:])
        return value.view(shape).transpose(0, 1)


def _added(sums: Float[Tensor, "part sum row"]) -> Float[Tensor, "sum row"]:
    """Parts of rows put together."""
    if len(sums) == 1:
        return sums[0]
    total = sums.sum(0)
    total[4] = sums[:, 4].amax(0)
    return total


def _entropy(mass: Tensor, plogp: Tensor) -> Tensor:
    # With M the sum of the weights, H = log M - (sum p log p) / M needs no normalized copy.
    return mass.log() - plogp * math.log(2) / mass


def _clamped(entropy: Tensor, count: Tensor) -> Tensor:
    """Rounding removed that would leave the range from 0 to the log of the number of keys."""
    return torch.minimum(entropy.clamp_min(0.0), count.log())


def _like(real: Tensor, value: Tensor) -> Tensor:
    return real if value.dim() == real.dim() else real[..., None]


def _readable(tensor: Tensor) -> Tensor:
    """With a dense last axis, in a type that kernels read."""
    if _KERNELS.INTERPRETED and tensor.dtype == torch.bfloat16:
        # The interpreter multiplies the bit patterns of bfloat16, not its values.
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _gathered(batch: TokenBatch) -> TokenBatch:
    """A batch with holes between its tokens as one packed row without."""
    sequences, query_start, key_start = [], 0, 0
    for sequence in batch.sequences:
        query_stop = query_start + sequence.query.shape[1]
        key_stop = key_start + sequence.key.shape[1]
        slots = Slots(0, slice(query_start, query_stop), slice(key_start, key_stop))
        sequences.append(replace(sequence, slots=slots))
        query_start, key_start = query_stop, key_stop
    return TokenBatch(
        query=torch.cat([sequence.query for sequence in sequences], 1)[None],
        key=torch.cat([sequence.key for sequence in sequences], 1)[None],
        lse=_joined_lse(sequences),
        sequences=tuple(sequences),
    )


def _joined_lse(sequences: list[TokenSequence]) -> Tensor | None:
    parts = [sequence.lse for sequence in sequences if sequence.lse is not None]
    return torch.cat(parts, 1)[None] if parts else None


def _repair(
    faint: Bool[Tensor, "batch heads query"],
    batch: TokenBatch,
    original: TokenBatch,
    request: Request,
    logits: Logits,
    results: dict[str, Tensor],
    *,
    per_head: bool,
    sinks: Float[Tensor, " heads"] | None,
) -> None:
    """Rows whose keys hold next to no mass, again by the chunked backend, which takes logarithms.

    Sequences are cut to the stretch from their first to their last faint row. Their denominators
    are not taken from the given ones, which may be coarse.
    """
    for sequence, target in zip(batch.sequences, original.sequences, strict=True):
        rows = faint[sequence.slots.row][:, sequence.slots.query].any(0).nonzero().flatten()
        if not len(rows):
            continue
        first, stop = int(rows[0]), int(rows[-1]) + 1
        queries = sequence.query.shape[1]
        kept = sequence.key.shape[1] - (queries - stop if logits.causal else 0)
        end = stop if logits.causal else queries
        found = sequence_statistics(
            sequence.query[:, first:end],
            sequence.key[:, :kept],
            request,
            logits,
            per_head=per_head,
            sinks=sinks,
        )
        slots = target.slots
        part = torch.arange(queries, device=faint.device)[first:end]
        index = slots.query
        if isinstance(index, slice):
            index = torch.arange(index.start, index.stop, device=faint.device)
        write_results(results, found, replace(slots, query=index[part]))
