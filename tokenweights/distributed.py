"""Merging sufficient statistics over process groups.

Every quantity that spans more than one token row is split in three: *sufficient statistics*, which
each rank takes from its own tokens; a *merge*, which is one of the reductions below; and a pure
*finish*. `group=None` means "these tokens are all there is" and never communicates. Pass
`torch.distributed.group.WORLD` for all ranks. Every rank of the group has to call, also one
without a single token: its statistics are the identity of the merge.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed


@typed
def global_sum(
    values: Float[Tensor, "*shape"], *, group: dist.ProcessGroup | None = None
) -> Float[Tensor, "*shape"]:
    """Elementwise sum over the ranks of a group, detached.

    Args:
        values: This rank's contribution, of the same shape on every rank.
        group: The ranks that share the batch; None leaves `values` as they are.

    Returns:
        The same numbers on every rank.

    Example:
        >>> global_sum(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    return _reduced(values, dist.ReduceOp.SUM, group)


@typed
def global_extrema(
    minimum: Float[Tensor, ""],
    maximum: Float[Tensor, ""],
    *,
    group: dist.ProcessGroup | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Smallest minimum and largest maximum over the ranks of a group, in one reduction.

    Args:
        minimum: This rank's minimum, `inf` where it has no token.
        maximum: This rank's maximum, `-inf` where it has no token.
        group: The ranks that share the batch; None leaves both as they are.

    Returns:
        Minimum and maximum, the same on every rank.

    Example:
        >>> global_extrema(torch.tensor(0.5), torch.tensor(2.0))
        (tensor(0.5000), tensor(2.))
    """
    low, negated_high = _reduced(torch.stack([minimum, -maximum]), dist.ReduceOp.MIN, group)
    return low, -negated_high


@typed
def gathered(
    values: Tensor,
    positions: Int[Tensor, " token"],
    *,
    dim: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The whole of a tensor that is sharded by position over a sequence-parallel group, detached.

    Contiguous shards (Ulysses), zigzag and ring shards differ only in their positions. Shards may
    be of different length, also empty. Each rank receives every other rank's shard once.

    Args:
        values: This rank's shard, of the same shape on every rank but for axis `dim`.
        positions: The position of each of its slices in the whole; over all ranks every position
            from 0 occurs once.
        dim: The sharded axis.
        group: The ranks that share the sequence, all of which have to call; None if this shard is
            all there is.

    Returns:
        The whole tensor in the order of positions, the same on every rank.

    Raises:
        TokenWeightsError: If the ranks' positions are not a permutation, or do not fit the axis.

    Example:
        >>> gathered(torch.tensor([[30.0, 10.0, 20.0]]), torch.tensor([2, 0, 1]), dim=1)
        tensor([[10., 20., 30.]])
    """
    if not -values.dim() <= dim < values.dim() or values.shape[dim] != len(positions):
        raise invalid(
            "gathered",
            "values",
            f"with {len(positions)} entries along axis {dim}, one for each position",
            f"shape {tuple(values.shape)}",
            "Name the sharded axis.",
        )
    lengths = _shard_lengths(len(positions), values.device, group)
    order = torch.cat(_shards(positions, 0, lengths, group))
    if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
        raise invalid(
            "gathered", "positions", "a permutation over the ranks", order.tolist(),
            "Give each token its position in the sequence, from 0.",
        )  # fmt: skip
    whole = torch.cat(_shards(values.detach(), dim, lengths, group), dim)
    return whole.index_select(dim, order.argsort())


@typed
def slice_positions(
    count: int, *, device: torch.device | str = "cpu", group: dist.ProcessGroup | None = None
) -> Int[Tensor, " token"]:
    """Positions in the whole of this rank's tokens, where ranks hold consecutive slices in order.

    Args:
        count: Number of this rank's tokens; it may differ between ranks and be 0.
        device: Where the result lies, and what the exchange of counts goes over.
        group: The ranks that share the sequence, all of which have to call; None if this is all.

    Returns:
        Positions for `gathered`.

    Example:
        >>> slice_positions(3)
        tensor([0, 1, 2])
    """
    lengths = _shard_lengths(count, torch.device(device), group)
    first = sum(lengths[: 0 if group is None else group.rank()])
    return torch.arange(first, first + count, device=device)


def _shard_lengths(own: int, device: torch.device, group: dist.ProcessGroup | None) -> list[int]:
    if group is None:
        return [own]
    lengths = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(group.size())]
    dist.all_gather(lengths, lengths[0].new_tensor([own]), group=group)
    return [int(length) for length in lengths]


def _shards(
    values: Tensor, dim: int, lengths: list[int], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Every rank's shard; shards travel padded to the longest, since a gather wants one shape."""
    if group is None:
        return [values]
    shape = list(values.shape)
    shape[dim] = max(lengths)
    padded = values.new_zeros(shape)
    padded.narrow(dim, 0, values.shape[dim]).copy_(values)
    received = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(received, padded, group=group)
    parts = zip(received, lengths, strict=True)
    return [part.narrow(dim, 0, length) for part, length in parts]


def _reduced(
    values: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> Tensor:
    reduced = values.detach().clone()
    if group is not None:
        dist.all_reduce(reduced, op=operation, group=group)
    return reduced
