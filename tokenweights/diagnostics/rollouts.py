"""What a collapse monitor reads from a rollout batch."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._typing import typed
from tokenweights.diagnostics.additive import Additive
from tokenweights.distributed import agreed
from tokenweights.masked import accumulator_dtype, require_finite


@dataclass(frozen=True)
class RolloutStatistics(Additive):
    """Number, length and reward of the responses of a rollout batch, as sums.

    Attributes:
        responses: Responses with a valid token.
        tokens: Their valid tokens.
        reward_total: Sum of their rewards.
    """

    responses: Float[Tensor, ""]
    tokens: Float[Tensor, ""]
    reward_total: Float[Tensor, ""]

    @property
    def length(self) -> float:
        """Mean number of valid tokens of a response; NaN without one."""
        return float(self.tokens / self.responses)

    @property
    def reward(self) -> float:
        """Mean reward of a response; NaN without one."""
        return float(self.reward_total / self.responses)


@agreed
@typed
def rollout_statistics(
    mask: Bool[Tensor, "batch token"],
    rewards: Float[Tensor, " batch"] | Int[Tensor, " batch"],
    *,
    group: dist.ProcessGroup | None = None,
) -> RolloutStatistics:
    """Mean response length and mean reward of a rollout batch, mergeable, for `CollapseMonitor`.

    Args:
        mask: True for valid response tokens. A row without one is padding and does not count.
        rewards: Reward of each response, finite where it counts.
        group: The ranks that share the batch.

    Returns:
        Sums over the whole batch, with the means as properties; the same on every rank.

    Raises:
        TokenWeightsError: If a reward is not finite.

    Example:
        >>> mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
        >>> statistics = rollout_statistics(mask, torch.tensor([1.0, -2.0, float("nan")]))
        >>> statistics.length, statistics.reward
        (2.0, -0.5)
    """
    counts = mask.any(-1)
    require_finite("rollout_statistics", "rewards", rewards[:, None], counts[:, None])
    dtype = accumulator_dtype(mask.device)
    return RolloutStatistics(
        counts.sum().to(dtype),
        mask.sum().to(dtype),
        torch.where(counts, rewards.detach().to(dtype), 0.0).sum(),
    ).over_ranks(group)
