"""From one projection ratio per token to those of groups, bands and single tokens (Eq. 6, J.1)."""

from dataclasses import dataclass

import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.distributed import agreed, global_sum

# The bands of the paper's appendix J.1: deciles 0-2, 3-6 and 7-9.
BANDS = (3, 7)


@agreed
@typed
def group_projection_ratios(
    projection_ratio: Float[Tensor, "batch token"],
    groups: Int[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    count: int,
    tolerance: float = 1e-5,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, " groups"]:
    """Projection ratio of each group of a partition under the all-token mean (Eq. 6, 25).

    A group's ratio is the sum over its tokens, so no further pass is needed. With
    `quantile_bins` as groups, the ratios of every probe step are the heat map of appendix J.1.

    Args:
        projection_ratio: From `token_alignment`.
        groups: Group number of each token; every valid token has one.
        mask: True for valid response tokens.
        count: Number of groups.
        tolerance: Largest distance of the sum from one.
        group: The ranks that share the batch.

    Returns:
        One ratio for each group, 0 for an empty one, summing to one; NaN where the full gradient
        was zero.

    Raises:
        TokenWeightsError: If a valid token has no group below `count`, the sum is not one, or
            `count` or `tolerance` is not positive.

    Example:
        >>> ratios, mask = torch.tensor([[0.5, 0.75, -0.25]]), torch.ones(1, 3, dtype=torch.bool)
        >>> group_projection_ratios(ratios, torch.tensor([[0, 1, 1]]), mask, count=2)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    if count < 1:
        hint = "Pass the number of groups."
        raise invalid("group_projection_ratios", "count", ">= 1", count, hint)
    if not tolerance > 0:
        raise invalid("group_projection_ratios", "tolerance", "> 0", tolerance, "Try 1e-5.")
    outside = mask & ~((groups >= 0) & (groups < count))
    if bool(outside.any()):
        place = tuple(outside.nonzero()[0].tolist())
        raise invalid(
            "group_projection_ratios",
            "groups",
            f"in [0, {count}) under a True mask",
            f"{int(groups[place])} at index {place}",
            "Give tokens outside your groups one of their own: only a partition sums to one.",
        )
    values = projection_ratio[mask].double()
    ratios = values.new_zeros(count).index_add_(0, groups[mask].long(), values)
    ratios = global_sum(ratios, group=group)
    total = float(ratios.sum())
    if abs(total - 1) > tolerance:
        raise invalid(
            "group_projection_ratios",
            "projection_ratio",
            f"that sums to one within {tolerance}",
            total,
            "Take the ratios and the mask of the same batch, and name the `group` of its ranks.",
        )
    return ratios


@dataclass(frozen=True)
class BandShares:
    """Shares of the projection on the full gradient by entropy band; they sum to one.

    Attributes:
        low: Deciles 0 to 2.
        middle: Deciles 3 to 6.
        high: Deciles 7 to 9.
    """

    low: float
    middle: float
    high: float


@typed
def band_shares(decile_ratios: Float[Tensor, " decile"]) -> BandShares:
    """Shares of the low, middle and high band in the sum of ten decile ratios (appendix J.1).

    Args:
        decile_ratios: Projection ratios of deciles 0 to 9.

    Returns:
        Three shares, which may be negative, as projection ratios may; NaN where a ratio is.

    Raises:
        TokenWeightsError: If there are not ten, or they sum to zero.

    Example:
        >>> band_shares(torch.tensor([1.0, 1.0, 0.0, 2.0, 0.0, 0.0, 2.0, 0.0, 1.0, 1.0]))
        BandShares(low=0.25, middle=0.5, high=0.25)
    """
    if len(decile_ratios) != 10:
        raise invalid(
            "band_shares", "decile_ratios", "ten", len(decile_ratios), "Use ten quantile bins."
        )
    wide = decile_ratios.detach().double()
    if not wide.sum():
        hint = "The projection ratios of a partition sum to one."
        raise invalid("band_shares", "decile_ratios", "with a sum other than 0", 0.0, hint)
    parts = wide[: BANDS[0]], wide[BANDS[0] : BANDS[1]], wide[BANDS[1] :]
    return BandShares(*(float(part.sum() / wide.sum()) for part in parts))


@typed
def extreme_tokens(
    projection_ratio: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    count: int = 10,
    largest: bool = False,
) -> Int[Tensor, "place 2"]:
    """Places of the tokens that pull hardest against the full gradient, or along it.

    Args:
        projection_ratio: From `token_alignment`.
        mask: True for valid response tokens.
        count: Number of tokens, >= 0; fewer if there are fewer valid ones with a ratio, which NaN
            is not.
        largest: False for the most negative ratios, True for the most positive.

    Returns:
        Row and position of each token, the most extreme first; of equal ones the earlier first.

    Raises:
        TokenWeightsError: If `count` is negative.

    Example:
        >>> ratios, mask = torch.tensor([[0.5, 0.75, -0.25]]), torch.ones(1, 3, dtype=torch.bool)
        >>> extreme_tokens(ratios, mask, count=1)
        tensor([[0, 2]])
    """
    if count < 0:
        raise invalid("extreme_tokens", "count", ">= 0", count, "Pass a number of tokens.")
    known = mask & ~projection_ratio.isnan()
    order = projection_ratio[known].sort(stable=True, descending=largest).indices
    return known.nonzero()[order[: min(count, len(order))]]
