"""Plain Python numbers from whatever stands for one: a NumPy scalar, a tensor of one element."""

import math
import operator
from typing import SupportsFloat, SupportsIndex

from tokenweights._errors import invalid


def plain_float(
    function: str, argument: str, value: SupportsFloat, *, limit: float = math.inf, hint: str
) -> float:
    """A finite number as a Python float, which any state can hold and JSON can write.

    Args:
        function: Public name of the function that was given the number.
        argument: Name of the argument.
        value: What was given.
        limit: Largest size that the function can reckon with.
        hint: One sentence that tells the reader what to do.

    Returns:
        The number.

    Raises:
        TokenWeightsError: If it is not one number, not finite, or larger than the limit.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and abs(number) <= limit):
        condition = "a finite number" + f" of at most {limit:g}" * math.isfinite(limit)
        raise invalid(function, argument, condition, value, hint)
    return number


def plain_integer(
    function: str, argument: str, value: SupportsIndex | SupportsFloat, *, hint: str
) -> int:
    """A whole number as a Python int; 3.0 is one.

    Args:
        function: Public name of the function that was given the number.
        argument: Name of the argument.
        value: What was given.
        hint: One sentence that tells the reader what to do.

    Returns:
        The number.

    Raises:
        TokenWeightsError: If it is not one whole number.
    """
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, RuntimeError):
        pass
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not number.is_integer():
        raise invalid(function, argument, "a whole number", value, hint)
    return int(number)
