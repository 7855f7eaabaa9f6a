"""Merging sufficient statistics over process groups.

Every quantity that spans more than one token row is split in three: *sufficient statistics*, which
each rank takes from its own tokens; a *merge*, which is one of the reductions below; and a pure
*finish*. `group=None` means "these tokens are all there is" and never communicates. Pass
`torch.distributed.group.WORLD` for all ranks. Every rank of the group has to call, also one
without a single token: its statistics are the identity of the merge.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

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


def _reduced(
    values: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> Tensor:
    reduced = values.detach().clone()
    if group is not None:
        dist.all_reduce(reduced, op=operation, group=group)
    return reduced
