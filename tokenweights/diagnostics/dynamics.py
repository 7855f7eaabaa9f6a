"""Mean and spread of a score over groups of tokens (Appendix I)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._typing import typed
from tokenweights.distributed import global_sum
from tokenweights.masked import accumulator_dtype, require_finite


@dataclass(frozen=True)
class GroupDynamics:
    """Statistics of a score over groups of tokens, in the score's unit.

    Attributes:
        count: Tokens of each group, over the whole batch.
        mean: Mean score; NaN for an empty group.
        std: Population standard deviation; NaN for an empty group.
    """

    count: Float[Tensor, " groups"]
    mean: Float[Tensor, " groups"]
    std: Float[Tensor, " groups"]


@typed
def group_dynamics(
    scores: Float[Tensor, "batch token"],
    groups: Sequence[Bool[Tensor, "batch token"]],
    *,
    group: dist.ProcessGroup | None = None,
) -> GroupDynamics:
    """Count, mean and standard deviation of the scores in each group of tokens.

    Args:
        scores: One score for each token, finite where a group holds it.
        groups: Masks of the groups, which may overlap: all tokens, anchors, explorers.
        group: The ranks that share the batch.

    Returns:
        Float64 statistics over the whole batch, detached, the same on every rank.

    Raises:
        TokenWeightsError: If a score inside a group is not finite.

    Example:
        >>> scores = torch.tensor([[0.25, 0.75, float("nan")]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> dynamics = group_dynamics(scores, [mask, mask & (scores > 0.5)])
        >>> dynamics.mean.tolist(), dynamics.std.tolist()
        ([0.5, 0.75], [0.25, 0.0])
    """
    wide = scores.detach().to(accumulator_dtype(scores.device))
    sums = []
    for members in groups:
        require_finite("group_dynamics", "scores", scores, members)
        inside = torch.where(members, wide, 0.0)
        sums.append(
            torch.stack([members.sum().to(wide.dtype), inside.sum(), inside.square().sum()])
        )
    count, total, squares = global_sum(torch.stack(sums), group=group).unbind(-1)
    mean = total / count
    return GroupDynamics(count, mean, (squares / count - mean.square()).clamp(min=0).sqrt())
