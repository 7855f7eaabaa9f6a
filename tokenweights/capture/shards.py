"""Attention calls of which a rank holds some of the tokens, some of the heads, or both."""

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Shards:
    """Where one rank's tokens and heads lie in the whole of an attention call.

    Attributes:
        positions: Place of each of this rank's tokens, batch row after batch row, in the row of all
            sequences one after another, ` token`.
        cu_seqlens: Where the sequences begin in that row, and its length, ` boundary`.
        token_group: The ranks that share the tokens, or None.
        head_group: The ranks that share the heads, or None.
    """

    positions: Tensor
    cu_seqlens: Tensor
    token_group: dist.ProcessGroup | None
    head_group: dist.ProcessGroup | None


def zigzag_positions(
    cu_seqlens: Tensor, *, ranks: int, rank: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Places of one rank's tokens where sequences are dealt out in zigzag order.

    Each sequence is cut into two blocks for every rank, of which rank r has the r-th and the r-th
    from the end, so that all ranks see about as many keys.

    Args:
        cu_seqlens: Where the sequences begin, and the end of the last, ` boundary`.
        ranks: Number of ranks.
        rank: One of them.
        device: Where the result lies.

    Returns:
        Places in the row, ` token`, sequence after sequence.

    Example:
        >>> zigzag_positions(torch.tensor([0, 4, 12]), ranks=2, rank=0)
        tensor([ 0,  3,  4,  5, 10, 11])
    """
    bounds = cu_seqlens.tolist()
    parts = [torch.arange(0)]
    for start, stop in itertools.pairwise(bounds):
        size = (stop - start) // (2 * ranks)
        parts.append(torch.arange(start + rank * size, start + (rank + 1) * size))
        parts.append(torch.arange(stop - (rank + 1) * size, stop - rank * size))
    return torch.cat(parts).to(device) if ranks > 1 else torch.arange(bounds[-1], device=device)


def token_major(states: Tensor) -> Tensor:
    """Queries or keys `batch heads token dim` as one row of tokens, batch row after batch row."""
    return rearrange(states, "batch heads token dim -> (batch token) heads dim")
