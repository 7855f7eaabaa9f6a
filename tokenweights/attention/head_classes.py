"""Local and global heads of a layer, told apart by how far back they look."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.masked import accumulator_dtype


@dataclass(frozen=True)
class HeadClasses:
    """Heads of one layer by the distance of their attention, fixed once and for all batches.

    Attributes:
        local: Numbers of the heads that look back least, ascending.
        distant: Numbers of the heads that look back farthest, ascending: the global heads.
    """

    local: tuple[int, ...]
    distant: tuple[int, ...]


@typed
@torch.no_grad()
def head_classes(
    distances: Float[Tensor, "batch heads query"],
    mask: Bool[Tensor, "batch query"],
    *,
    share: float = 0.3,
) -> HeadClasses:
    """Local and global heads of a layer: those whose mean distance is least, and largest.

    The mean is over all valid queries of a probe batch (arXiv 2510.13554 takes response rows and
    30%). Of `heads` heads each class has `share` of them, rounded, and at least one. Ties go to the
    lower number.

    Args:
        distances: Distance of each head's attention, as `attention_distance` with `heads="none"`
            gives it, in tokens.
        mask: True at the queries that count.
        share: Share of the heads in each class, in (0, 0.5].

    Returns:
        Both classes, which have no head in common where there are two heads or more.

    Raises:
        TokenWeightsError: If no query counts, or `share` is out of range.

    Example:
        >>> distances = torch.tensor([[[9.0, 8.0], [1.0, 2.0], [5.0, 5.0]]])
        >>> head_classes(distances, torch.ones(1, 2, dtype=torch.bool))
        HeadClasses(local=(1,), distant=(0,))
    """
    if not 0 < share <= 0.5:
        raise invalid("head_classes", "share", "to be in (0, 0.5]", share, "Take 0.3.")
    if not bool(mask.any()):
        hint = "Pass a probe batch with responses."
        raise invalid("head_classes", "mask", "to have a True query", "none", hint)
    wide = distances.to(accumulator_dtype(distances.device))
    total = torch.where(mask[:, None], wide, 0.0).sum((0, 2))
    heads = distances.shape[1]
    count = min(max(round(share * heads), 1), max(heads // 2, 1))
    order = total.argsort(stable=True).tolist()
    return HeadClasses(tuple(sorted(order[:count])), tuple(sorted(order[-count:])))
