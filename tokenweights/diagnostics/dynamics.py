"""Mean and spread of a score over groups of tokens, head by head if need be (Appendix I)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.diagnostics.additive import alike
from tokenweights.distributed import agreed, global_sum, merge
from tokenweights.masked import accumulator_dtype, require_finite, row_chunks


@dataclass(frozen=True)
class GroupDynamics:
    """Statistics of a score over groups of tokens, in the score's unit.

    Scores with a head axis give every field one as well.

    Attributes:
        count: Tokens of each group, over the whole batch.
        mean: Mean score; NaN for an empty group.
        std: Population standard deviation; NaN for an empty group.
    """

    count: Float[Tensor, "groups *heads"]
    mean: Float[Tensor, "groups *heads"]
    std: Float[Tensor, "groups *heads"]

    @typed
    def merged(self, other: "GroupDynamics") -> "GroupDynamics":
        """The statistics of both parts of a batch.

        Args:
            other: Statistics of the same groups in other responses.

        Returns:
            A new record.

        Raises:
            TokenWeightsError: If the groups or heads differ in number.
        """
        alike(self, other)
        count = self.count + other.count
        totals = self._totals() + other._totals()
        mean = totals / count
        return GroupDynamics(
            count, mean, ((self._squares(mean) + other._squares(mean)) / count).sqrt()
        )

    @merge
    @typed
    def over_ranks(self, group: dist.ProcessGroup | None) -> "GroupDynamics":
        """The statistics of the whole batch, in two reductions.

        Args:
            group: The ranks that share the batch, all of which have to call; None leaves the
                record as it is.

        Returns:
            The same record on every rank.
        """
        if group is None:
            return self
        own = torch.stack([self.count, self._totals()])
        count, totals = global_sum(own, group=group).unbind(0)
        mean = totals / count
        squares = global_sum(self._squares(mean), group=group)
        return GroupDynamics(count, mean, (squares / count).sqrt())

    def _totals(self) -> Tensor:
        return torch.where(self.count > 0, self.count * self.mean, 0.0)

    def _squares(self, center: Tensor) -> Tensor:
        """Sums of squared deviations from a mean that need not be this part's own."""
        deviations = self.std.square() + (self.mean - center).square()
        return torch.where(self.count > 0, self.count * deviations, 0.0)


@agreed
@typed
def group_dynamics(
    scores: Float[Tensor, "batch *heads token"],
    groups: Sequence[Bool[Tensor, "batch token"]],
    *,
    group: dist.ProcessGroup | None = None,
) -> GroupDynamics:
    """Count, mean and standard deviation of the scores in each group of tokens.

    Squares are taken of deviations from the mean, so a large common offset costs no digits.

    Args:
        scores: One score for each token, finite where a group holds it; or one for each head and
            token, from `heads="none"`, for statistics head by head.
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
    for members in groups:
        require_finite_heads("group_dynamics", "scores", scores, members)
    return local_dynamics(scores, groups).over_ranks(group)


def local_dynamics(scores: Tensor, groups: Sequence[Tensor]) -> GroupDynamics:
    """The statistics of this rank's tokens, a few rows at a time; scores are not checked."""
    dtype = accumulator_dtype(scores.device)
    counts = torch.stack([members.count_nonzero() for members in groups]).to(dtype)
    count = counts.view(-1, *[1] * (scores.dim() - 2)).expand(-1, *scores.shape[1:-1])

    def sums(center: Tensor | None) -> Tensor:
        total = torch.zeros(count.shape, dtype=dtype, device=scores.device)
        for rows in row_chunks(groups[0].shape):
            wide = scores[rows].detach().to(dtype)
            for place, members in enumerate(groups):
                apart = wide if center is None else (wide - center[place][..., None]).square_()
                total[place] += token_sum(apart, members[rows])
        return total

    # Means come before deviations are squared: a large common offset then costs no digits.
    mean = sums(None) / count
    return GroupDynamics(count, mean, (sums(mean) / count).sqrt())


def token_sum(values: Tensor, members: Tensor) -> Tensor:
    """Sum of `batch *heads token` over the members of a group of tokens: one for each head."""
    inside = members.view(len(members), *[1] * (values.dim() - 2), members.shape[-1])
    return torch.where(inside, values, 0.0).sum((0, -1))


def require_finite_heads(function: str, argument: str, values: Tensor, members: Tensor) -> None:
    """As `require_finite`, for `batch *heads token`."""
    heads = values.movedim(0, -2).reshape(-1, *members.shape) if values.numel() else ()
    for head in heads:
        require_finite(function, argument, head, members)
