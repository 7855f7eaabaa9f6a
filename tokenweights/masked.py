"""Sums, means, extrema and ranks over valid tokens: the only place that knows about masks.

Values under a False mask, NaN included, never change a result, and receive a zero gradient.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed

CHUNK_TOKENS = 2**16  # temporaries of a few hundred KiB are reused and stay in the cache


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """The widest float of the device: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values add up: their own, but at least float32."""
    return torch.promote_types(dtype, torch.float32)


def batch_total(
    function: str, argument: str, value: Tensor | float, device: torch.device
) -> Tensor:
    """A count or sum over a whole batch as a detached scalar of the widest float.

    Args:
        function: Name of the public function that takes it.
        argument: Name of the argument that holds it.
        value: A number or a scalar tensor of any dtype.
        device: Where the result lies.

    Raises:
        TokenWeightsError: If it is negative or not finite; no check under `torch.compile`.
    """
    if isinstance(value, int) and abs(value) > 2**1023:
        value = torch.inf if value > 0 else -torch.inf
    total = torch.as_tensor(value, dtype=accumulator_dtype(device), device=device).detach()
    if not torch.compiler.is_compiling() and not 0 <= float(total) < torch.inf:
        hint = "Take it over the whole batch."
        raise invalid(function, argument, "finite and >= 0", float(total), hint)
    return total


def row_chunks(shape: torch.Size) -> Iterator[slice]:
    """Slices of whole rows, some tens of thousands of tokens each, to keep temporaries small."""
    rows, tokens = shape
    step = max(CHUNK_TOKENS // max(tokens, 1), 1)
    for start in range(0, max(rows, 1), step):  # once even for no rows, to keep a graph
        yield slice(start, start + step)


def require_finite(function: str, argument: str, values: Tensor, mask: Tensor) -> None:
    """Raise if any value under a True mask is NaN or infinite; no check under `torch.compile`.

    Args:
        function: Name of the public function that checks its input.
        argument: Name of the argument that holds `values`.
        values: Values to check.
        mask: True where a value counts.

    Raises:
        TokenWeightsError: If a valid value is not finite; it names the first place.
    """
    if torch.compiler.is_compiling():
        return  # an error that depends on data has no place in a graph
    for rows in row_chunks(mask.shape):
        if not _finite(*_extrema_and_zero(values[rows], mask[rows])):
            bad = mask[rows] & ~torch.isfinite(values[rows])
            row, token = bad.nonzero()[0].tolist()
            place = (row + rows.start, token)
            raise invalid(
                function,
                argument,
                "finite under a True mask",
                f"{values[place].item()} at index {place}",
                "Mask that token out, or find out why its value is not finite.",
            )


def require_weights(function: str, weights: Tensor, mask: Tensor) -> None:
    """Raise if any weight under a True mask is negative or not finite.

    Args:
        function: Name of the public function that checks its input.
        weights: Token weights.
        mask: True where a weight counts.

    Raises:
        TokenWeightsError: If a valid weight is negative or not finite.
    """
    if torch.compiler.is_compiling():
        return
    for rows in row_chunks(mask.shape):
        low, high = _extrema_and_zero(weights[rows], mask[rows])
        if not _finite(low, high):
            require_finite(function, "weights", weights, mask)
        if low < 0:
            raise invalid(
                function,
                "weights",
                ">= 0, since the sign of the advantage picks the clip side",
                low,
                "To drop tokens, give them weight 0.",
            )


def _extrema_and_zero(values: Tensor, mask: Tensor) -> tuple[float, float]:
    """Extrema of the valid values and 0; NaN if one of them is."""
    if values.numel() == 0:
        return 0.0, 0.0
    low, high = torch.stack(torch.where(mask, values.detach(), 0.0).aminmax()).tolist()
    return low, high


def _finite(low: float, high: float) -> bool:
    return -math.inf < low and high < math.inf


@typed
def masked_sum(
    values: Float[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, ""]:
    """Sum of the valid values.

    Args:
        values: Any float dtype.
        mask: True where a value counts.

    Returns:
        A scalar of the dtype of `values`, but float32 for half precision; 0 for an empty mask.
        Differentiable in `values`.

    Example:
        >>> values = torch.tensor([[1.0, 2.0, float("nan")]])
        >>> masked_sum(values, torch.tensor([[True, True, False]]))
        tensor(3.)
    """
    return torch.where(mask, values, 0.0).sum(dtype=sum_dtype(values.dtype))


@typed
def masked_mean(
    values: Float[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, ""]:
    """Mean of the valid values, over all rows at once.

    Args:
        values: Any float dtype.
        mask: True where a value counts.

    Returns:
        A scalar as in `masked_sum`; 0 for an empty mask.

    Example:
        >>> values = torch.tensor([[1.0, 2.0], [6.0, float("nan")]])
        >>> masked_mean(values, torch.tensor([[True, True], [True, False]]))
        tensor(3.)
    """
    return masked_sum(values, mask) / mask.count_nonzero().clamp(min=1)


@typed
def masked_extrema(
    values: Float[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Smallest and largest valid value.

    Args:
        values: Any float dtype.
        mask: True where a value counts.

    Returns:
        Minimum and maximum, differentiable in `values`; `(inf, -inf)`, the identity of a merge,
        for an empty mask.

    Example:
        >>> values = torch.tensor([[1.0, 2.0], [6.0, float("nan")]])
        >>> masked_extrema(values, torch.tensor([[True, True], [True, False]]))
        (tensor(1.), tensor(6.))
    """
    if values.numel() == 0:
        infinity = values.new_tensor(torch.inf)
        return infinity, -infinity
    low = torch.where(mask, values, torch.inf).amin()
    high = torch.where(mask, values, -torch.inf).amax()
    return low, high


@typed
def masked_order(
    values: Float[Tensor, "batch token"] | Int[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
) -> Int[Tensor, "batch token"]:
    """Indices that sort each row's valid values in ascending order, masked tokens last.

    The sort is stable: of equal values the earlier position comes first.

    Args:
        values: Finite under the mask; integers of any size.
        mask: True where a value counts.

    Returns:
        For each row a permutation of its positions.

    Raises:
        TokenWeightsError: If a valid value is not finite.

    Example:
        >>> values = torch.tensor([[0.3, float("nan"), 0.1, 0.3]])
        >>> masked_order(values, torch.tensor([[True, False, True, True]]))
        tensor([[2, 0, 3, 1]])
    """
    return _masked_order("masked_order", values, mask)


def _masked_order(function: str, values: Tensor, mask: Tensor) -> Tensor:
    if values.is_floating_point():
        require_finite(function, "values", values, mask)
        return torch.where(mask, values, torch.inf).argsort(dim=-1, stable=True)
    last = torch.iinfo(values.dtype).max
    order = torch.where(mask, values, last).argsort(dim=-1, stable=True)
    if not torch.compiler.is_compiling() and not bool((mask & (values == last)).any()):
        return order
    # A valid integer as large as that stands among the masked tokens: part them.
    valid = mask.gather(-1, order)
    behind = valid.sum(-1, keepdim=True) + (~valid).cumsum(-1)
    places = torch.where(valid, valid.cumsum(-1), behind) - 1
    return torch.empty_like(order).scatter_(-1, places, order)


@typed
def masked_ranks(
    values: Float[Tensor, "batch token"] | Int[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
) -> Int[Tensor, "batch token"]:
    """Rank of each valid value within its row, 0 for the smallest.

    Equal values are ranked by position, the earlier first. Masked tokens take the ranks after the
    last valid one.

    Args:
        values: As in `masked_order`.
        mask: True where a value counts.

    Returns:
        For each row a permutation of `0 .. token - 1`.

    Raises:
        TokenWeightsError: If a valid value is not finite.

    Example:
        >>> values = torch.tensor([[0.3, float("nan"), 0.1, 0.3]])
        >>> masked_ranks(values, torch.tensor([[True, False, True, True]]))
        tensor([[1, 3, 0, 2]])
    """
    order = _masked_order("masked_ranks", values, mask)
    positions = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, positions)
