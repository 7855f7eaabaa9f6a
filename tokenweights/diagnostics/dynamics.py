"""Mean and spread of a score over groups of tokens (Appendix I)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.distributed import global_sum
from tokenweights.masked import accumulator_dtype, masked_sum, require_finite


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
        TokenWeightsError: If there is no group, or a score inside one is not finite.

    Example:
        >>> scores = torch.tensor([[0.25, 0.75, float("nan")]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> dynamics = group_dynamics(scores, [mask, mask & (scores > 0.5)])
        >>> dynamics.mean.tolist(), dynamics.std.tolist()
        ([0.5, 0.75], [0.25, 0.0])
    """
    if not groups:
        raise invalid("group_dynamics", "groups", "with a mask", "none", "Pass at least one.")
    wide = scores.detach().to(accumulator_dtype(scores.device))
    for members in groups:
        require_finite("group_dynamics", "scores", scores, members)
    # Means are merged before deviations are squared: a large common offset then costs no digits.
    sums = [torch.stack([g.count_nonzero().to(wide.dtype), masked_sum(wide, g)]) for g in groups]
    count, total = global_sum(torch.stack(sums), group=group).unbind(-1)
    mean = total / count
    squares = [masked_sum((wide - m).square(), g) for g, m in zip(groups, mean, strict=True)]
    variance = global_sum(torch.stack(squares), group=group) / count
    return GroupDynamics(count, mean, variance.sqrt())
