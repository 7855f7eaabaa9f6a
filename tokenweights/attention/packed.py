"""Attention entropy of packed rows that may be sliced over ranks, exact on any layout."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from tokenweights._errors import invalid, refused_by
from tokenweights._typing import typed
from tokenweights.attention.api import attention_entropy_varlen
from tokenweights.attention.parallel import check_own
from tokenweights.attention.statistics import EntropyKind, Request
from tokenweights.distributed import agreed, agreement, gathered, slice_positions


@agreed
@typed
@torch.no_grad()
def packed_entropy(
    query: Float[Tensor, "token heads dim"],
    key: Float[Tensor, "token kv_heads dim"],
    position_ids: Int[Tensor, " token"],
    *,
    group: dist.ProcessGroup | None = None,
    kind: EntropyKind = "normalized",
    top_k: int = 256,
    fixed_k: int = 256,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, " token"]:
    """Attention entropy of each token of a packed row, in nats, within the token's own sequence.

    A packed row holds sequences one after another; `position_ids` counts from 0 in each of them.
    Over several ranks each holds a consecutive slice of the row, in rank order, as Ulysses before
    its all-to-all and ring attention do; a slice may begin within a sequence and may be empty. Only
    keys and positions travel, once; see `sequence_parallel_bytes`. No gradient. Memory is the keys
    of the whole row and a bounded workspace.

    Args:
        query: Queries of this rank's slice.
        key: Keys of this rank's slice.
        position_ids: Position of each token in its own sequence.
        group: The ranks that share the row, all of which have to call; None if this is all.
        kind: As in `attention_entropy`.
        top_k: As in `attention_entropy`.
        fixed_k: As in `attention_entropy`.
        scale: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: As in `attention_entropy`.

    Returns:
        The entropies of this rank's tokens.

    Raises:
        TokenWeightsError: As `attention_entropy`, or if positions do neither count on nor start
            again from 0.

    Example:
        >>> query, key = torch.zeros(5, 4, 8), torch.zeros(5, 2, 8)
        >>> packed_entropy(query, key, torch.tensor([0, 1, 0, 1, 2]), kind="raw")
        tensor([0.0000, 0.6931, 0.0000, 0.6931, 1.0986])
    """
    function, request = "packed_entropy", Request((kind,), top_k, fixed_k)
    rows = query.transpose(0, 1)[None], key.transpose(0, 1)[None]
    check_own(function, rows[0], rows[1], request, None, scale, window, softcap, sinks)
    held = packed_slice(key, position_ids, group)
    with agreement(function, group), refused_by(function):
        bounds = held.bounds(function)
        if not len(query):
            return query.new_zeros(0, dtype=torch.float32)
        return attention_entropy_varlen(
            query,
            held.key[int(bounds[0]) : int(bounds[-1])],
            cu_seqlens_q=bounds.clamp(min=held.first) - held.first,
            cu_seqlens_k=bounds - bounds[0],
            kind=kind,
            top_k=top_k,
            fixed_k=fixed_k,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )


@dataclass(frozen=True)
class PackedSlice:
    """One rank's slice of a packed row, with the keys of all of it.

    Attributes:
        key: Keys of the whole row, `token kv_heads dim`.
        positions: Position of each token of the whole row in its own sequence.
        first: Where the slice begins.
        last: Where it ends.
    """

    key: Tensor
    positions: Tensor
    first: int
    last: int

    def bounds(self, function: str) -> Int[Tensor, " boundary"]:
        """From the start of the sequence that the slice begins in, up to the slice's end."""
        starts = _sequence_starts(function, self.positions)
        if self.first == self.last:
            return starts[:0]
        bounds = torch.cat([starts[starts < self.last], starts.new_tensor([self.last])])
        return bounds[int((bounds[:-1] <= self.first).sum()) - 1 :]


def packed_slice(
    key: Float[Tensor, "token kv_heads dim"],
    position_ids: Int[Tensor, " token"],
    group: dist.ProcessGroup | None,
) -> PackedSlice:
    """The slices of all ranks' keys and positions put together; every rank has to call."""
    own = slice_positions(len(position_ids), device=key.device, group=group)
    whole_key = gathered(key, own, dim=0, group=group)
    positions = gathered(position_ids, own, dim=0, group=group)
    first, last = (int(own[0]), int(own[-1]) + 1) if len(own) else (0, 0)
    return PackedSlice(whole_key, positions, first, last)


def _sequence_starts(function: str, positions: Int[Tensor, " token"]) -> Int[Tensor, " sequence"]:
    is_start = positions == 0
    counts_on = torch.ones_like(is_start)
    if len(positions):
        counts_on[0] = is_start[0]
        counts_on[1:] = is_start[1:] | (positions.diff() == 1)
    if not bool(counts_on.all()):
        place = int((~counts_on).nonzero()[0])
        raise invalid(
            function,
            "position_ids",
            "counting up from 0 in every sequence",
            f"{positions[max(place - 1, 0) : place + 1].tolist()} at token {place}",
            "Pass the positions that the model got, slices in rank order.",
        )
    return is_start.nonzero().flatten()
