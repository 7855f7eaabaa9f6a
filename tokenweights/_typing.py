"""Runtime-checked shapes for public functions, and the words that name the axes.

| axis | meaning |
|---|---|
| `batch` | responses, or rows of a batch |
| `token` | response tokens, right-padded |
| `query`, `key` | positions of an attention matrix |
| `heads`, `kv_heads` | query heads; key-value heads, fewer under grouped-query attention |
| `dim` | width of one head |
| `vocab` | next-token vocabulary |
| `total` | tokens of all packed sequences, one after another |
| `layers` | layers, heads or other scores of the same tokens |
| `mass` | thresholds of attention mass |
"""

import functools
import random
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar, cast, get_args, get_origin

import torch
from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

P = ParamSpec("P")
R = TypeVar("R")

# `is_pep484_tower` lets an `int` stand where a `float` is annotated, as Python's own typing does.
_checker = beartype(conf=BeartypeConf(is_pep484_tower=True))


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """The function with its jaxtyping annotations checked at every call.

    The check is skipped while `torch.compile` traces, where it cannot run. Setting the environment
    variable `JAXTYPING_DISABLE=1` turns every check off.

    Args:
        function: A function whose parameters and result are annotated.

    Returns:
        The checked function.

    Example:
        >>> import torch
        >>> from jaxtyping import Float
        >>> @typed
        ... def total(values: Float[torch.Tensor, "batch token"]) -> float:
        ...     return float(values.sum())
        >>> total(torch.ones(2, 3))
        6.0
    """
    checked = jaxtyped(function, typechecker=_checker)
    if any(_holds_items(hint) for hint in function.__annotations__.values()):
        checked = _leaving_random_alone(checked)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return checked(*args, **kwargs)

    return cast("Callable[P, R]", wrapper)


def _leaving_random_alone(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with Python's random state put back after its arguments were checked.

    Of a sequence the checker looks at one random item, drawn from the global generator.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        state = random.getstate()
        try:
            return function(*args, **kwargs)
        finally:
            random.setstate(state)

    return wrapper


def _holds_items(hint: Any) -> bool:
    origin = get_origin(hint)
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return True
    return any(_holds_items(part) for part in get_args(hint))
