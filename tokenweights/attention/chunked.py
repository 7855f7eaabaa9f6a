"""The head-averaged attention distribution, a few rows at a time, in plain torch.

A block of query rows meets one tile of heads after another. Each tile is turned into weights in
place and added to the block's mean distribution, which is then reduced to one number per row.
Memory is `rows x keys`; no `query x key` matrix exists.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tokenweights.attention.results import joined
from tokenweights.attention.rows import (
    RowBlock,
    first_keys,
    fixed_entropy_from_logs,
    row_blocks,
    row_statistics,
)
from tokenweights.attention.statistics import Logits, Request

# On a CPU a tile should stay in a core's cache; an accelerator wants few, large launches.
CPU_ROWS, CPU_TILE_BYTES = 128, 2**20
ACCELERATOR_ROWS, ACCELERATOR_TILE_BYTES = 512, 2**28
WORKSPACE_BYTES = 2**28

# Below every score, yet finite: it cannot make a NaN.
HIDDEN = torch.finfo(torch.float32).min
# Weights below exp(-60) of a row's largest are rounded up to that. No float32 sum notices, and the
# CPU is spared the slow paths of underflow and of subnormal products, which would cost a peaked
# distribution many times the sweep itself.
FLOOR = -60.0
# Where the first K keys hold less mass than this the floor would show: logarithms take over.
FIXED_MASS = 1e-16


class Workspace:
    """Float32 buffers that live through all blocks of one call."""

    def __init__(self, device: torch.device):
        self.device = device
        self._flat: dict[str, Tensor] = {}

    def buffer(self, name: str, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor, overwritten by the next call with this name."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = torch.empty(size, device=self.device)
            self._flat[name] = flat
        return flat[:size].view(shape)


@dataclass(frozen=True)
class _Scores:
    """Float32 queries and keys of one block, and how to turn them into masked logits."""

    query: Float[Tensor, "heads query dim"]
    key: Float[Tensor, "kv_heads key dim"]
    sinks: Float[Tensor, "heads 1 1"] | None
    lse: Float[Tensor, "heads query 1"] | None
    block: RowBlock
    logits: Logits
    workspace: Workspace

    def tiles(self) -> Iterator[tuple[slice, Float[Tensor, "tile query key"]]]:
        """Masked logits of some heads after another, in a buffer that the next tile overwrites."""
        heads, group = self.query.shape[0], self.query.shape[0] // self.key.shape[0]
        step = _heads_per_tile(heads, group, self.block)
        cap = self.logits.softcap
        # Where a key is hidden, the smaller of score and bound is the bound.
        bounds = [
            (columns, torch.where(hidden, HIDDEN, torch.inf))
            for columns, hidden in self.block.hidden
        ]
        for first in range(0, heads, step):
            taken = slice(first, min(first + step, heads))
            kv = slice(first // group, (taken.stop - 1) // group + 1)
            kv_heads = kv.stop - kv.start
            tile = self.workspace.buffer(
                "tile", taken.stop - first, self.block.queries, self.block.keys
            )
            # The query heads of one key head are stacked as rows: keys are never repeated.
            stacked = tile.view(kv_heads, -1, self.block.keys)
            torch.baddbmm(
                stacked,
                self.query[taken].reshape(kv_heads, -1, self.query.shape[2]),
                self.key[kv].transpose(1, 2),
                beta=0,
                alpha=self.logits.scale if cap is None else self.logits.scale / cap,
                out=stacked,
            )
            if cap is not None:
                tile.tanh_().mul_(cap)
            for columns, bound in bounds:
                corner = tile[..., columns]
                torch.minimum(corner, bound, out=corner)
            yield taken, tile

    def weights(
        self,
    ) -> Iterator[tuple[Float[Tensor, "tile query key"], Float[Tensor, "tile query 1"]]]:
        """Tile after tile as `(tile, factor)`: the attention weights are `tile * factor`."""
        for taken, tile in self.tiles():
            if self.lse is not None:
                tile.sub_(self.lse[taken]).clamp_min_(FLOOR).exp_()
                yield tile, torch.ones_like(self.lse[taken])
                continue
            largest = tile.amax(-1, keepdim=True)
            if self.sinks is not None:
                largest = torch.maximum(largest, self.sinks[taken])
            total = tile.sub_(largest).clamp_min_(FLOOR).exp_().sum(-1, keepdim=True)
            if self.sinks is not None:
                total += (self.sinks[taken] - largest).exp_()
            yield tile, total.reciprocal_()

    def mean_weights(self) -> Float[Tensor, "1 query key"]:
        """The weights averaged over heads."""
        mean = self.workspace.buffer("mean", 1, self.block.queries, self.block.keys).zero_()
        for tile, factor in self.weights():
            factor = factor / self.query.shape[0]
            for head in range(tile.shape[0]):
                mean[0].addcmul_(tile[head], factor[head])
        return mean
