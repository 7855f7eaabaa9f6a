"""The head-averaged attention distribution, a few rows at a time, in plain torch.

A block of query rows meets one tile of heads after another. Each tile is turned into weights in
place and added to the block's mean distribution, which is then reduced to one number per row.
Memory is `rows x keys`; no `query x key` matrix exists. Short sequences of equal lengths share a
tile: their heads stand one after another, as those of one sequence do.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights.attention.received_chunked import ColumnSums
from tokenweights.attention.results import joined
from tokenweights.attention.rows import (
    RowBlock,
    first_keys,
    log_row_statistics,
    row_blocks,
    row_statistics,
)
from tokenweights.attention.scores import check_scores, float32_limit, score_range
from tokenweights.attention.statistics import Logits, Request
from tokenweights.masked import accumulator_dtype

# On a CPU a tile should stay in a core's cache; an accelerator wants few, large launches.
CPU_ROWS, CPU_TILE_BYTES = 128, 2**20
ACCELERATOR_ROWS, ACCELERATOR_TILE_BYTES = 512, 2**28
WORKSPACE_BYTES = 2**28

# Below every score, yet finite: it cannot make a NaN.
HIDDEN = torch.finfo(torch.float32).min
# Scores within +-30 need no shift before the exponential: nothing overflows, and no weight comes
# near the smallest float32. Hidden keys then stand at FLOOR, e^-30 below the least score.
SMALL_SCORE = 30.0
# Weights below exp(-60) of a row's largest are rounded up to that. No float32 sum notices, and the
# CPU is spared the slow paths of underflow and of subnormal products, which would cost a peaked
# distribution many times the sweep itself.
FLOOR = -60.0
# Keys that together hold less than this, because a sink or later keys take the rest, would show the
# floor: their rows are computed again from logarithms.
FAINT_MASS = 1e-16


class Workspace:
    """Buffers that live through all blocks of one call."""

    def __init__(self, device: torch.device):
        self.device = device
        self._flat: dict[str, Tensor] = {}

    def buffer(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialized contiguous tensor, overwritten by the next call with this name.

        A name keeps the type of its first call.
        """
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            # Causal blocks grow one after another; new memory for each would cost page faults.
            grown = size if flat is None else max(size, 2 * flat.numel())
            flat = torch.empty(grown, dtype=dtype, device=self.device)
            self._flat[name] = flat
        return flat[:size].view(shape)


@dataclass(frozen=True)
class _Scores:
    """Queries and keys of one block, and how to turn them into masked logits.

    The heads are those of all sequences, one sequence after another. `small` and `in_float32` say
    for each whether its exponentials need no shift, and whether float32 resolves its scores; the
    other heads are multiplied in float64.
    """

    query: Float[Tensor, "heads query dim"]
    key: Float[Tensor, "kv_heads key dim"]
    sequences: int
    sinks: Float[Tensor, "heads 1 1"] | None
    lse: Float[Tensor, "heads query 1"] | None
    small: tuple[bool, ...]
    in_float32: tuple[bool, ...]
    block: RowBlock
    logits: Logits
    workspace: Workspace

    @property
    def wide(self) -> torch.dtype:
        """The type of products that float32 does not resolve, of sinks and of denominators."""
        return accumulator_dtype(self.query.device)

    def tiles(self) -> Iterator[slice]:
        """Heads that are worked on together, one tile after another."""
        heads, group = self.query.shape[0], self.query.shape[0] // self.key.shape[0]
        step = _heads_per_tile(heads, group, self.block)
        for first in range(0, heads, step):
            yield slice(first, min(first + step, heads))

    def bounds(self, hidden_score: float = HIDDEN) -> list[tuple[slice, Float[Tensor, "..."]]]:
        """Column ranges with hidden keys; where one is, the smaller of score and bound is this."""
        everywhere = torch.tensor(torch.inf, dtype=torch.float32, device=self.block.device)
        return [
            (columns, torch.where(hidden, hidden_score, everywhere))
            for columns, hidden in self.block.hidden
        ]

    def masked_logits(
        self, taken: slice, dtype: torch.dtype, bounds: list[tuple[slice, Tensor]]
    ) -> Float[Tensor, "tile query key"]:
        """The logits of some heads, in a buffer that the next tile of this type overwrites."""
        group, cap = self.query.shape[0] // self.key.shape[0], self.logits.softcap
        kv = slice(taken.start // group, (taken.stop - 1) // group + 1)
        kv_heads, size = kv.stop - kv.start, taken.stop - taken.start
        tile = self.workspace.buffer(
            f"tile {dtype}", size, self.block.queries, self.block.keys, dtype=dtype
        )
        # The query heads of one key head are stacked as rows: keys are never repeated.
        stacked = tile.view(kv_heads, -1, self.block.keys)
        torch.baddbmm(
            stacked,
            self.query[taken].to(dtype).reshape(kv_heads, -1, self.query.shape[2]),
            self.key[kv].to(dtype).transpose(1, 2),
            beta=0,
            alpha=self.logits.scale,
            out=stacked,
        )
        if cap is not None:
            tile.div_(cap).tanh_().mul_(cap)
        for columns, bound in bounds:
            corner = tile[..., columns]
            torch.minimum(corner, bound, out=corner)
        return tile

    def weights(
        self,
    ) -> Iterator[tuple[Float[Tensor, "tile query key"], Float[Tensor, "tile query 1"] | None]]:
        """Tile after tile as `(tile, factor)`: the weights are `tile * factor`, if there is one."""
        # Only for speed: the exponential of HIDDEN would be 0 as well, but slow.
        bounds = self.bounds(FLOOR if self.lse is None and all(self.small) else HIDDEN)
        for taken in self.tiles():
            shift = None
            if all(self.in_float32[taken]):
                tile = self.masked_logits(taken, torch.float32, bounds)
            else:
                # What is left after the shift is small where it matters: float32 holds it.
                wide = self.masked_logits(taken, self.wide, bounds)
                shift = wide.amax(-1, keepdim=True)
                tile = self.workspace.buffer("narrow", *wide.shape).copy_(wide.sub_(shift))
            if self.lse is not None:
                lse = self.lse[taken] if shift is None else self.lse[taken] - shift
                yield tile.sub_(lse.float()).clamp_min_(FLOOR).exp_(), None
                continue
            if shift is None and not all(self.small[taken]):
                shift = tile.amax(-1, keepdim=True)
                tile.sub_(shift)
            if shift is not None:
                tile.clamp_min_(FLOOR)
            if self.sinks is None:
                # On a CPU one call of softmax takes less than torch.exp alone.
                yield torch.softmax(tile, -1, out=self.workspace.buffer("soft", *tile.shape)), None
                continue
            total = tile.exp_().sum(-1, keepdim=True)
            # A sink that overflows here leaves its head no weight, which is then exact.
            sinks = self.sinks[taken] if shift is None else self.sinks[taken] - shift
            total += sinks.float().exp_()
            yield tile, total.reciprocal_()

    def mean_weights(self) -> Float[Tensor, "sequence query key"]:
        """The weights averaged over the heads of each sequence."""
        mean = self.workspace.buffer("mean", self.sequences, self.block.queries, self.block.keys)
        share, started = self.sequences / self.query.shape[0], False
        for tile, factor in self.weights():
            if factor is not None:
                tile.mul_(factor)
            # The same head of all sequences at once.
            for weights in tile.unflatten(0, (self.sequences, -1)).unbind(1):
                if started:
                    mean.add_(weights, alpha=share)
                else:
                    torch.mul(weights, share, out=mean)
                    started = True
        return mean

    def log_weights(self, *, per_head: bool) -> Float[Tensor, "heads query key"]:
        """Logarithms of the weights, or of their mean over heads, in the widest type."""
        parts: list[Tensor] = []
        bounds = self.bounds()
        for taken in self.tiles():
            tile = self.masked_logits(taken, self.wide, bounds)
            lse = tile.logsumexp(-1, keepdim=True) if self.lse is None else self.lse[taken]
            if self.lse is None and self.sinks is not None:
                lse = torch.logaddexp(lse, self.sinks[taken])
            part = (tile - lse).clamp_min_(HIDDEN / 2)
            if per_head:
                parts.append(part)
            else:
                part = part.unflatten(0, (self.sequences, -1)).logsumexp(1)
                parts = [torch.logaddexp(parts[0], part) if parts else part]
        return torch.cat(parts)


def sequence_statistics(
    query: Float[Tensor, "heads query dim"],
    key: Float[Tensor, "kv_heads key dim"],
    request: Request,
    logits: Logits,
    *,
    sequences: int = 1,
    per_head: bool = False,
    sinks: Float[Tensor, " heads"] | None = None,
    lse: Float[Tensor, "heads query"] | None = None,
    workspace: Workspace | None = None,
    rows: int | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    columns: ColumnSums | None = None,
    function: str = "attention_statistics",
) -> dict[str, Tensor]:
    """The requested statistics of an unpadded sequence, queries being its last positions.

    Args:
        query: Queries.
        key: Keys.
        request: What to compute.
        logits: How scores become logits, and which keys a query sees.
        sequences: How many sequences of equal lengths stand one after another along the heads; no
            more than `sequences_per_tile`.
        per_head: Keep heads apart instead of averaging their distributions.
        sinks: Extra logits in the denominator, one per head.
        lse: Natural log of the softmax denominators, if known.
        workspace: Buffers to reuse from sequence to sequence.
        rows: Query rows per block; fewer are taken where `workspace_bytes` demands it.
        workspace_bytes: Bound on the memory of one block.
        columns: Where to add what each key receives.
        function: Public name for error messages.

    Returns:
        One tensor `heads query` per kind, with a single head of each sequence unless `per_head`.
    """
    workspace = Workspace(query.device) if workspace is None else workspace
    scores = score_range(query, key, logits.scale)
    check_scores(function, scores)
    in_float32 = scores.in_float32(float32_limit(query.device))
    if all(in_float32):
        # Products of half-precision numbers are exact in float32.
        query, key = query.float(), key.float()
    cap = torch.inf if logits.softcap is None else logits.softcap
    small = tuple(min(size, cap) <= SMALL_SCORE for size in scores.largest)
    wide = accumulator_dtype(query.device)
    sinks = None if sinks is None else sinks.to(wide)[:, None, None]
    lse = None if lse is None else lse.to(wide)[:, :, None]
    queries, keys = query.shape[1], key.shape[1]
    rows = _row_count(query.device, sequences * keys, request, rows, workspace_bytes)
    results = []
    for taken, block in row_blocks(
        queries=queries, keys=keys, rows=rows, logits=logits, device=query.device
    ):
        if reads_first_keys(request, lse):
            block = first_keys(block, request.fixed_k)
        block_scores = _Scores(
            query=query[:, taken],
            key=key[:, block.key_slice],
            sequences=sequences,
            sinks=sinks,
            lse=None if lse is None else lse[:, taken],
            small=small,
            in_float32=in_float32,
            block=block,
            logits=logits,
            workspace=workspace,
        )
        found = _block_statistics(block_scores, request, per_head=per_head, columns=columns)
        results.append(found)
    return joined(results, 1)


def sequences_per_tile(*, heads: int, queries: int, keys: int, device: torch.device) -> int:
    """How many sequences of these lengths a tile holds with all their heads, at least one."""
    rows = min(queries, CPU_ROWS if device.type == "cpu" else ACCELERATOR_ROWS)
    return max(_tile_bytes(device) // max(4 * heads * rows * keys, 1), 1)


def reads_first_keys(request: Request, lse: Tensor | None) -> bool:
    """Whether the first K keys of each row are all that a sweep needs.

    With the denominators known, nothing else enters the fixed-position entropy.
    """
    return lse is not None and request.kinds == ("fixed",) and request.received is None


def _block_statistics(
    scores: _Scores, request: Request, *, per_head: bool, columns: ColumnSums | None
) -> dict[str, Tensor]:
    if per_head:
        tiles = (tile if factor is None else tile.mul_(factor) for tile, factor in scores.weights())
    else:
        tiles = iter([scores.mean_weights()])
    asked = request
    if scores.sinks is not None:
        asked = request.only(*dict.fromkeys((*request.kinds, "row_mass")))
    parts: list[dict[str, Tensor]] = []
    head = 0
    for weights in tiles:
        for corner, hidden in scores.block.hidden:
            weights[..., corner].masked_fill_(hidden, 0.0)
        scratch = scores.workspace.buffer("scratch", *weights.shape)
        parts.append(
            row_statistics(weights, scores.block, asked, least_mass=FAINT_MASS, scratch=scratch)
        )
        if columns is not None:
            columns.add(weights, scores.block, slice(head, head + len(weights)))
        head += len(weights)
    results = joined(parts, 0)
    faint = _faint_rows(results, scores)
    if faint is not None and bool(faint.any()):
        logs = scores.log_weights(per_head=per_head)
        exact = log_row_statistics(logs, scores.block, request)
        for kind in exact:
            where = faint[..., None] if kind == "support_size" else faint
            results[kind] = torch.where(where, exact[kind], results[kind])
    return {kind: results[kind] for kind in request.kinds}


def _faint_rows(results: dict[str, Tensor], scores: _Scores) -> Bool[Tensor, "heads query"] | None:
    """Rows whose relevant keys hold too little mass for float32 to divide; None if impossible."""
    faint = None
    if scores.sinks is not None:
        faint = results["row_mass"] < FAINT_MASS
    if "fixed" in results:
        undefined = results["fixed"].isnan()
        faint = undefined if faint is None else faint | undefined
    return faint


def _row_count(
    device: torch.device, keys: int, request: Request, rows: int | None, workspace_bytes: int
) -> int:
    if rows is None:
        rows = CPU_ROWS if device.type == "cpu" else ACCELERATOR_ROWS
    # Scores, weights, mean and logarithm are float32; sorting adds values, positions and a float64
    # running sum.
    bytes_per_key = 40 if {"topk", "support_size"} & set(request.kinds) else 16
    affordable = workspace_bytes // (bytes_per_key * max(keys, 1))
    return max(min(rows, affordable), 1)


def _heads_per_tile(heads: int, group: int, block: RowBlock) -> int:
    """As many heads as a tile holds: whole key-value groups, or an even share of one."""
    fitting = min(max(_tile_bytes(block.device) // (4 * block.queries * block.keys), 1), heads)
    if fitting >= group:
        return fitting // group * group
    return max(share for share in range(1, fitting + 1) if group % share == 0)


def _tile_bytes(device: torch.device) -> int:
    return CPU_TILE_BYTES if device.type == "cpu" else ACCELERATOR_TILE_BYTES
