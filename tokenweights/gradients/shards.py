"""Inner products of gradients that are whole, replicated or sharded; only scalars cross ranks."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenweights.distributed import global_sum
from tokenweights.masked import accumulator_dtype

# Elements converted to float64 at a time: a bound on what an inner product holds beside its inputs.
CHUNK_ELEMENTS = 2**20

Groups = tuple[dist.ProcessGroup, ...]


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is. Detached."""
    sharded: Any = tensor.detach()
    return sharded.to_local() if hasattr(sharded, "to_local") else sharded


def shard_groups(tensor: Tensor, group: dist.ProcessGroup | None) -> Groups:
    """The process groups over which a tensor's shards add up to the whole.

    Args:
        tensor: A DTensor, which knows its mesh, or a plain tensor.
        group: Ranks over which plain tensors are shards; None where they are whole.

    Returns:
        One group for each sharded mesh axis; replicated axes have none.
    """
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return () if group is None else (group,)
    placements: Any = getattr(tensor, "placements", ())
    return tuple(mesh.get_group(axis) for axis, p in enumerate(placements) if p.is_shard())


def inner_product(
    first: Iterable[Tensor], second: Sequence[Tensor], *, group: dist.ProcessGroup | None = None
) -> float:
    """Inner product of two lists of tensors as one vector, accumulated in float64.

    Args:
        first: Tensors; DTensors are taken by their local shards.
        second: Tensors of the same shapes and placements.
        group: Ranks over which plain tensors are shards; None where they are whole.

    Returns:
        The same number on every rank.
    """
    totals: dict[Groups, Tensor] = {}
    for a, b in zip(first, second, strict=True):
        groups = shard_groups(b, group)
        part = _local_inner(local_shard(a), local_shard(b))
        totals[groups] = totals[groups] + part if groups in totals else part
    return reduced_total(totals)


def reduced_total(totals: dict[Groups, Tensor]) -> float:
    """Sum of partial sums, each over the ranks of its groups.

    Args:
        totals: This rank's partial sum for each tuple of groups, from `shard_groups`.

    Returns:
        The same number on every rank.
    """
    result = 0.0
    for groups, total in totals.items():
        for group in groups:
            total = global_sum(total, group=group)
        result += float(total)
    return result


def _local_inner(a: Tensor, b: Tensor) -> Tensor:
    wide = accumulator_dtype(a.device)
    total = torch.zeros((), dtype=wide, device=a.device)
    # Views where the layout allows one; a gradient may have another layout than its neighbour.
    a, b = a.reshape(-1), b.reshape(-1)
    for start in range(0, a.numel(), CHUNK_ELEMENTS):
        rows = slice(start, start + CHUNK_ELEMENTS)
        total += (a[rows].to(wide) * b[rows].to(wide)).sum()
    return total
