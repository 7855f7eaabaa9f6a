"""The head-averaged attention distribution, a few rows at a time, in plain torch.

A block of query rows meets one tile of heads after another. Each tile is turned into weights in
place and added to the block's mean distribution, which is then reduced to one number per row.
Memory is `rows x keys`; no `query x key` matrix exists.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from tokenweights.attention.results import joined
from tokenweights.attention.rows import RowBlock, first_keys, row_blocks, row_statistics
from tokenweights.attention.statistics import Logits, Request

# On a CPU a tile should stay in a core's cache; an accelerator wants few, large launches.
CPU_ROWS, CPU_TILE_BYTES = 128, 2**20
ACCELERATOR_ROWS, ACCELERATOR_TILE_BYTES = 512, 2**28
WORKSPACE_BYTES = 2**28

# Below every score, yet finite: it vanishes in the exponential and cannot make a NaN.
HIDDEN = torch.finfo(torch.float32).min


class Workspace:
    """Float32 buffers that live through all blocks of one call."""

    def __init__(self, device: torch.device):
        self.device = device
        self._flat: dict[str, Tensor] = {}

    def buffer(self, name: str, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor that is overwritten by the next call of this name."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = torch.empty(size, device=self.device)
            self._flat[name] = flat
        return flat[:size].view(shape)


def sequence_statistics(
    query: Float[Tensor, "heads query dim"],
    key: Float[Tensor, "kv_heads key dim"],
    request: Request,
    logits: Logits,
    *,
    per_head: bool = False,
    sinks: Float[Tensor, " heads"] | None = None,
    lse: Float[Tensor, "heads query"] | None = None,
    workspace: Workspace | None = None,
    rows: int | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> dict[str, Tensor]:
    """The requested statistics of one unpadded sequence, queries being its last positions.

    Args:
        query: Queries.
        key: Keys.
        request: What to compute.
        logits: How scores become logits, and which keys a query sees.
        per_head: Keep heads apart instead of averaging their distributions.
        sinks: Extra logits in the denominator, one per head.
        lse: Natural log of the softmax denominators, if known.
        workspace: Buffers to reuse from sequence to sequence.
        rows: Query rows per block; fewer are taken where `workspace_bytes` demands it.
        workspace_bytes: Bound on the memory of one block.

    Returns:
        One tensor `heads query` per kind, with a single head unless `per_head`.
    """
    workspace = Workspace(query.device) if workspace is None else workspace
    # Products of half-precision numbers are exact in float32.
    query, key = query.float(), key.float()
    sinks = None if sinks is None else sinks.float()[:, None, None]
    lse = None if lse is None else lse.float()[:, :, None]
    queries, keys = query.shape[1], key.shape[1]
    rows = _row_count(query.device, keys, request, rows, workspace_bytes)
    partial = reads_first_keys(request, lse)
    blocks = []
    for taken, block in row_blocks(
        queries=queries, keys=keys, rows=rows, logits=logits, device=query.device
    ):
        if partial:
            block = first_keys(block, request.fixed_k)
        tiles = _tiles(
            query[:, taken],
            key[:, block.key_slice],
            block,
            logits,
            sinks,
            None if lse is None else lse[:, taken],
            workspace,
        )
        if per_head:
            parts = [row_statistics(tile.mul_(factor), block, request) for tile, factor in tiles]
            blocks.append(joined(parts, 0))
        else:
            mean = _mean_distribution(tiles, query.shape[0], block, workspace)
            blocks.append(row_statistics(mean, block, request))
    return joined(blocks, 1)


def reads_first_keys(request: Request, lse: Tensor | None) -> bool:
    """Whether the first K keys of each row are all that a sweep needs.

    With the denominators known, nothing else enters the fixed-position entropy.
    """
    return lse is not None and request.kinds == ("fixed",)


def _mean_distribution(
    tiles: Iterator[tuple[Tensor, Tensor]], heads: int, block: RowBlock, workspace: Workspace
) -> Float[Tensor, "1 query key"]:
    mean = workspace.buffer("mean", 1, block.queries, block.keys).zero_()
    for tile, factor in tiles:
        factor = factor / heads
        for head in range(tile.shape[0]):
            mean[0].addcmul_(tile[head], factor[head])
    return mean


def _tiles(
    query: Float[Tensor, "heads query dim"],
    key: Float[Tensor, "kv_heads key dim"],
    block: RowBlock,
    logits: Logits,
    sinks: Float[Tensor, "heads 1 1"] | None,
    lse: Float[Tensor, "heads query 1"] | None,
    workspace: Workspace,
) -> Iterator[tuple[Float[Tensor, "tile query key"], Float[Tensor, "tile query 1"]]]:
    """Tile after tile of heads, as `(tile, factor)`: the weights are `tile * factor`."""
    heads, group = query.shape[0], query.shape[0] // key.shape[0]
    step = _heads_per_tile(heads, group, block, query.device)
    scale = logits.scale if logits.softcap is None else logits.scale / logits.softcap
    hidden = block.hidden
    for first in range(0, heads, step):
        taken = slice(first, min(first + step, heads))
        tile = workspace.buffer("tile", taken.stop - first, block.queries, block.keys)
        kv = slice(first // group, (taken.stop - 1) // group + 1)
        # The query heads of one key-value head are stacked as rows: keys are never repeated.
        stacked = tile.view(kv.stop - kv.start, -1, block.keys)
        torch.baddbmm(
            stacked,
            query[taken].reshape(kv.stop - kv.start, -1, query.shape[2]),
            key[kv].transpose(1, 2),
            beta=0,
            alpha=scale,
            out=stacked,
        )
        if logits.softcap is not None:
            tile.tanh_().mul_(logits.softcap)
        for columns, mask in hidden:
            tile[..., columns].masked_fill_(mask, HIDDEN)
        if lse is not None:
            tile.sub_(lse[taken]).exp_()
            yield tile, torch.ones_like(lse[taken])
            continue
        largest = tile.amax(-1, keepdim=True)
        if sinks is not None:
            largest = torch.maximum(largest, sinks[taken])
        denominator = tile.sub_(largest).exp_().sum(-1, keepdim=True)
        if sinks is not None:
            denominator += (sinks[taken] - largest).exp_()
        yield tile, denominator.reciprocal_()


def _row_count(
    device: torch.device, keys: int, request: Request, rows: int | None, workspace_bytes: int
) -> int:
    if rows is None:
        rows = CPU_ROWS if device.type == "cpu" else ACCELERATOR_ROWS
    # Tile, mean and logarithm are float32; sorting adds values, positions and a running sum.
    bytes_per_key = 32 if {"topk", "support_size"} & set(request.kinds) else 12
    affordable = workspace_bytes // (bytes_per_key * max(keys, 1))
    return max(min(rows, affordable), 1)


def _heads_per_tile(heads: int, group: int, block: RowBlock, device: torch.device) -> int:
    """As many heads as a tile holds: whole key-value groups, or an even share of one."""
    tile_bytes = CPU_TILE_BYTES if device.type == "cpu" else ACCELERATOR_TILE_BYTES
    fitting = min(max(tile_bytes // (4 * block.queries * block.keys), 1), heads)
    if fitting >= group:
        return fitting // group * group
    return max(share for share in range(1, fitting + 1) if group % share == 0)
