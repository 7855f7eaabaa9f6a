"""How a subset's gradient lies towards the gradient of all tokens (Eq. 4-6)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.distributed import agreed
from tokenweights.gradients.shards import inner_product


@dataclass(frozen=True)
class GradientGeometry:
    """A subset's gradient against the full one; dimensionless.

    Attributes:
        norm_ratio: Its length in units of the full gradient's (Eq. 4), >= 0.
        cosine: Agreement of the directions (Eq. 5), in [-1, 1]; beyond only where it is sketched.
        projection_ratio: Its contribution along the full gradient (Eq. 6). Under the all-token
            mean the projection ratios of any partition sum to one.
    """

    norm_ratio: float
    cosine: float
    projection_ratio: float


@agreed
@typed
def gradient_geometry(
    subset: Sequence[Tensor], full: Sequence[Tensor], *, group: dist.ProcessGroup | None = None
) -> GradientGeometry:
    r"""Norm ratio, cosine and projection ratio of a subset's gradient (Eq. 4, 5, 6).

    $\|g_S\| / \|g\|$, $\langle g_S, g \rangle / (\|g_S\| \|g\|)$ and
    $\langle g_S, g \rangle / \|g\|^2$, over all tensors as one vector, accumulated in float64.
    A zero full gradient has no direction: all three are then NaN. A zero subset gradient has norm
    and projection ratio 0 and cosine NaN. Of DTensors each rank takes its own shards, and three
    scalars are reduced.

    Args:
        subset: The subset's gradient, one tensor for each parameter.
        full: The full gradient, of the same shapes.
        group: Ranks that each hold a shard of plain tensors, such as flat shards; None where plain
            tensors are whole.

    Returns:
        Three Python floats.

    Raises:
        TokenWeightsError: If the two do not have the same shapes, or hold no tensor.

    Example:
        >>> import torch
        >>> gradient_geometry([torch.tensor([3.0, 0.0])], [torch.tensor([3.0, 4.0])])
        GradientGeometry(norm_ratio=0.6, cosine=0.6, projection_ratio=0.36)
    """
    if not full:
        hint = "Pass a tensor for each parameter."
        raise invalid("gradient_geometry", "full", "with a tensor", "none", hint)
    shapes = [tuple(tensor.shape) for tensor in full]
    if [tuple(tensor.shape) for tensor in subset] != shapes:
        raise invalid(
            "gradient_geometry",
            "subset",
            f"of the same shapes as `full`, {shapes}",
            [tuple(tensor.shape) for tensor in subset],
            "Take both gradients over the same parameters.",
        )
    return geometry_of(
        inner=inner_product(subset, full, group=group),
        subset_square=inner_product(subset, subset, group=group),
        full_square=inner_product(full, full, group=group),
    )


def geometry_of(
    *, inner: float, subset_square: float, full_square: float, sketched: bool = False
) -> GradientGeometry:
    """Eq. 4-6 from an inner product and two squared norms.

    Args:
        inner: Of the subset's gradient and the full one.
        subset_square: Squared norm of the subset's gradient.
        full_square: Squared norm of the full gradient.
        sketched: Whether `inner` is an estimate, which a bound would bias. Otherwise a cosine
            leaves [-1, 1] by rounding alone.

    Returns:
        The three ratios, with NaN where a direction is missing.
    """
    nan = float("nan")
    if full_square == 0:
        return GradientGeometry(nan, nan, nan)
    subset_norm, full_norm = subset_square**0.5, full_square**0.5
    cosine = inner / (subset_norm * full_norm) if subset_square > 0 else nan
    return GradientGeometry(
        norm_ratio=subset_norm / full_norm,
        # In this order NaN stays NaN.
        cosine=cosine if sketched else max(min(cosine, 1.0), -1.0),
        projection_ratio=inner / full_square,
    )
