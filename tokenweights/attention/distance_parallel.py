"""Distances of attention where the sequence or the heads are spread over ranks.

Rows are local under sequence parallelism; over heads, a sum of weights and one of weights times
distance add up.
"""

import itertools

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import refused_by
from tokenweights._typing import typed
from tokenweights.attention.api import attention_statistics
from tokenweights.attention.checks import check_distance_bound
from tokenweights.attention.distance import attention_distance
from tokenweights.attention.packed import packed_slice
from tokenweights.attention.parallel import check_own, row_runs, whole_keys
from tokenweights.attention.statistics import Request
from tokenweights.attention.sweeps import HeadNumbers, averaged
from tokenweights.distributed import agreed, agreement, global_sum
from tokenweights.masked import accumulator_dtype

_REQUEST = Request(("row_mass",))


@agreed
@typed
@torch.no_grad()
def sequence_parallel_distance(
    query: Float[Tensor, "batch heads token dim"],
    key: Float[Tensor, "batch kv_heads token dim"],
    positions: Int[Tensor, " token"],
    *,
    group: dist.ProcessGroup | None = None,
    bound: int | None = None,
    heads: HeadNumbers = None,
    key_mask: Bool[Tensor, "batch token"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch token"]:
    """Mean distance of the attention of this rank's tokens, in real tokens.

    Only keys travel, as in `sequence_parallel_entropy`. No gradient.

    Args:
        query: As in `sequence_parallel_entropy`.
        key: As in `sequence_parallel_entropy`.
        positions: As in `sequence_parallel_entropy`.
        group: As in `sequence_parallel_entropy`.
        bound: As in `attention_distance`.
        heads: Numbers of the query heads that are averaged; None for all.
        key_mask: As in `sequence_parallel_entropy`.
        scale: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: As in `attention_entropy`.

    Returns:
        The distances of this rank's tokens, in their order, float32.

    Raises:
        TokenWeightsError: As `attention_distance`, or if positions are not a permutation.

    Example:
        >>> query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
        >>> sequence_parallel_distance(query, key, torch.tensor([2, 0, 1]))
        tensor([[1.0000, 0.0000, 0.5000]])
    """
    function = "sequence_parallel_distance"
    check_distance_bound(function, "bound", bound)
    check_own(function, query, key, _REQUEST, key_mask, scale, window, softcap, sinks)
    keys, mask = whole_keys(function, key, positions, key_mask, group)
    distance = torch.zeros(query.shape[0], query.shape[2], device=query.device).float()
    with agreement(function, group), refused_by(function):
        for rows, seen in row_runs(positions):
            distance[:, rows] = attention_distance(
                query[:, :, rows],
                keys[:, :, :seen],
                bound=bound,
                heads=averaged(heads),
                key_mask=None if mask is None else mask[:, :seen],
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
            )
    return distance


@agreed
@typed
@torch.no_grad()
def tensor_parallel_distance(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    *,
    group: dist.ProcessGroup | None = None,
    bound: int | None = None,
    key_mask: Bool[Tensor, "batch key"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch query"]:
    """Mean distance of every query's attention where each rank holds some heads, in real tokens.

    Sums of weights and of weights times distance over a rank's heads add up: two numbers per query
    travel. The same on every rank. No gradient.

    Args:
        query: As in `tensor_parallel_entropy`.
        key: As in `tensor_parallel_entropy`.
        group: As in `tensor_parallel_entropy`.
        bound: As in `attention_distance`.
        key_mask: As in `tensor_parallel_entropy`.
        scale: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: Sinks of this rank's heads.

    Returns:
        The distances, float32.

    Raises:
        TokenWeightsError: As `attention_distance`.

    Example:
        >>> query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
        >>> tensor_parallel_distance(query, key, bound=1)
        tensor([[0.0000, 0.5000, 0.6667]])
    """
    function = "tensor_parallel_distance"
    check_distance_bound(function, "bound", bound)
    check_own(function, query, key, _REQUEST, key_mask, scale, window, softcap, sinks)
    with agreement(function, group), refused_by(function):
        found = attention_statistics(
            query,
            key,
            kinds=("mean_distance", "row_mass"),
            distance_bound=bound,
            key_mask=key_mask,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
    assert found.mean_distance is not None and found.row_mass is not None
    mass = found.row_mass.to(accumulator_dtype(query.device))
    sums = torch.stack([found.mean_distance * mass, mass])
    far, mass = global_sum(sums, group=group)
    return torch.where(mass > 0, far / mass.where(mass > 0, 1.0), 0.0).float()


@agreed
@typed
@torch.no_grad()
def packed_distance(
    query: Float[Tensor, "token heads dim"],
    key: Float[Tensor, "token kv_heads dim"],
    position_ids: Int[Tensor, " token"],
    *,
    group: dist.ProcessGroup | None = None,
    bound: int | None = None,
    heads: HeadNumbers = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, " token"]:
    """Mean distance of the attention of each token of a packed row, in tokens of its sequence.

    Only keys and positions travel, as in `packed_entropy`. No gradient.

    Args:
        query: As in `packed_entropy`.
        key: As in `packed_entropy`.
        position_ids: As in `packed_entropy`.
        group: As in `packed_entropy`.
        bound: As in `attention_distance`.
        heads: Numbers of the query heads that are averaged; None for all.
        scale: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: As in `attention_entropy`.

    Returns:
        The distances of this rank's tokens, float32.

    Raises:
        TokenWeightsError: As `attention_distance` and `packed_entropy`.

    Example:
        >>> query, key = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8)
        >>> packed_distance(query, key, torch.tensor([0, 0, 1, 2]))
        tensor([0.0000, 0.0000, 0.5000, 1.0000])
    """
    function = "packed_distance"
    check_distance_bound(function, "bound", bound)
    own = query.transpose(0, 1)[None], key.transpose(0, 1)[None]
    check_own(function, *own, _REQUEST, None, scale, window, softcap, sinks)
    held = packed_slice(key, position_ids, group)
    with agreement(function, group), refused_by(function):
        bounds = held.bounds(function).tolist()
        parts = [query.new_zeros(0, dtype=torch.float32)]
        for start, stop in itertools.pairwise(bounds):
            rows = slice(max(start, held.first) - held.first, stop - held.first)
            found = attention_distance(
                query[rows].transpose(0, 1)[None],
                held.key[start:stop].transpose(0, 1)[None],
                bound=bound,
                heads=averaged(heads),
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
            )
            parts.append(found[0])
    return torch.cat(parts)
