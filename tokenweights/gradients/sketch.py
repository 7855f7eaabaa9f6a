"""A fixed random projection of gradients: inner products of two that are never held at once."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tokenweights._random import random_keys
from tokenweights.gradients.shards import Groups, local_shard, reduced_total, shard_groups
from tokenweights.masked import accumulator_dtype

# Elements hashed at a time: a bound on the memory of their keys.
CHUNK_ELEMENTS = 2**18
SIGN_BIT = 52

Sketch = dict[Groups, Tensor]


def gradient_sketch(
    gradient: Sequence[Tensor], *, width: int, seed: int, group: dist.ProcessGroup | None = None
) -> Sketch:
    r"""Sums of randomly signed elements in random buckets (a count sketch).

    Bucket and sign of an element are hashed from the seed, its rank and its place, so nothing of
    the projection is stored. For two gradients the inner product of their sketches has the mean
    $\langle a, b \rangle$ and a variance of at most
    $(\|a\|^2 \|b\|^2 + \langle a, b \rangle^2) / k \le 2 \|a\|^2 \|b\|^2 / k$ over seeds, with $k$
    the width. Shards are sketched where they are, independently, which keeps the bound.

    Args:
        gradient: Tensors; DTensors are taken by their local shards.
        width: Number of buckets $k$.
        seed: Chooses the projection; sketches of one seed belong together.
        group: Ranks over which plain tensors are shards; None where they are whole.

    Returns:
        This rank's sketch, `width` numbers for each kind of sharding.
    """
    sketch: Sketch = {}
    start = 0
    for tensor in gradient:
        groups, values = shard_groups(tensor, group), local_shard(tensor).reshape(-1)
        wide = accumulator_dtype(values.device)
        if groups not in sketch:
            sketch[groups] = torch.zeros(width, dtype=wide, device=values.device)
        rank = 0
        for axis in groups:
            rank = rank * axis.size() + axis.rank()
        stream = torch.tensor([rank], device=values.device)
        for chunk in values.split(CHUNK_ELEMENTS):
            places = torch.arange(start, start + len(chunk), device=values.device)
            keys = random_keys(seed, stream, places[None])[0]
            signs = 1 - 2 * (keys >> SIGN_BIT)
            buckets = (keys & ((1 << SIGN_BIT) - 1)) % width
            sketch[groups].index_add_(0, buckets, chunk.to(wide) * signs)
            start += len(chunk)
    return sketch


def sketched_inner_product(first: Sketch, second: Sketch) -> float:
    """Unbiased estimate of the inner product of two gradients.

    Args:
        first: Sketch of one gradient.
        second: Sketch of the other, of the same seed, width and shards.

    Returns:
        The same number on every rank.
    """
    return reduced_total({groups: first[groups] @ second[groups] for groups in first})
