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
import inspect
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from jaxtyping import TypeCheckError, config, jaxtyped

from tokenweights._errors import TokenWeightsTypeError, invalid
from tokenweights._hints import Condition, Sizes, condition_of, shown

# Names of arguments that are shares of a count.
SHARES = frozenset({"fraction", "share"})

P = ParamSpec("P")
R = TypeVar("R")


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """The function with its annotations checked at every call, by jaxtyping and beartype.

    What an argument plainly means is taken for what is asked: integers of 0 and 1 for a mask, an
    integer tensor for a count, NumPy's arrays and scalars for tensors and numbers, tensors for
    sequences of numbers. A scalar is the very number it holds, also where that is more digits than
    were written; only as `fraction` or `share`, which counts are multiplied by, it is the shortest
    decimal that rounds to it. An argument that fits is handed on as it is.

    The check is skipped while `torch.compile` traces, where it cannot run; integer masks and counts
    are taken there too, but that a mask is 0 and 1 is not checked. Setting the environment variable
    `JAXTYPING_DISABLE=1` turns the check off in the same way.

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
        >>> total(torch.ones(3))
        Traceback (most recent call last):
        ...
        tokenweights._errors.TokenWeightsTypeError: `total`: expected `values` to be a float tensor
        of shape (batch, token), got a float32 tensor of shape (3,). Give it the axes
        (batch, token).
    """
    call = cast(Callable[..., R], function)
    name = function.__qualname__.rpartition("<locals>.")[2].removesuffix(".__init__")
    namespace = function.__globals__
    # Where an argument stands if it is given by position, its name, and what is asked of it.
    parameters = [
        (
            place if parameter.kind != parameter.KEYWORD_ONLY else sys.maxsize,
            parameter.name,
            condition_of(parameter.annotation, namespace, share=parameter.name in SHARES),
        )
        for place, parameter in enumerate(inspect.signature(function).parameters.values())
        if parameter.annotation is not parameter.empty
    ]
    traced = [
        (place, argument, condition.traced)
        for place, argument, condition in parameters
        if condition.traced is not None
    ]
    promised = condition_of(function.__annotations__.get("return", Any), namespace)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        if torch.compiler.is_compiling() or config.jaxtyping_disable:
            for place, argument, condition in traced:
                if place < len(given):
                    given[place] = condition.meant(given[place])
                elif argument in kwargs:
                    kwargs[argument] = condition.meant(kwargs[argument])
            return call(*given, **kwargs)
        with jaxtyped("context"):  # in which the axes of all arguments and the result agree
            for place, argument, condition in parameters:
                if place < len(given):
                    if not condition.fits(given[place]):
                        given[place] = taken(argument, given, kwargs)
                elif argument in kwargs and not condition.fits(kwargs[argument]):
                    kwargs[argument] = taken(argument, given, kwargs)
            result = call(*given, **kwargs)
            if not promised.fits(result):
                raise TypeCheckError(
                    f"`{name}`: promises {promised.words({})}, returned {shown(result)}. "
                    "This is a fault of the function, not of the call: please report it."
                )
            return result

    def taken(wrong: str, given: list[Any], kwargs: dict[str, Any]) -> Any:
        """What an argument that does not fit plainly means."""
        agreed: dict[str, Sizes] = {}
        for place, argument, condition in parameters:
            value = given[place] if place < len(given) else kwargs.get(argument)
            if argument != wrong:
                agreed[argument] = condition.axes(value)
                continue
            meant = condition.meant(value)
            if meant is not value and condition.fits(meant):
                return meant
            raise _refused(name, argument, condition, value, agreed)

    return cast(Callable[P, R], wrapper)


def _refused(
    function: str, argument: str, condition: Condition, value: Any, agreed: dict[str, Sizes]
) -> TokenWeightsTypeError:
    """The error for an argument that does not fit, beside others that agree in their axes."""
    sizes = {axis: size for own in agreed.values() for axis, size in own.items()}
    got, advice = condition.fault(value, argument)
    if not advice:
        others = [f"`{name}`" for name, own in agreed.items() if own.keys() & condition.axis_names]
        advice = f"Its axes have to agree with those of {' and '.join(others) or 'one another'}."
    words = f"to be {condition.words(sizes)}"
    return invalid(function, argument, words, got, advice, error=TokenWeightsTypeError)
