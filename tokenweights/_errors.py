"""The one exception of the library, and the one template its messages follow."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from jaxtyping import TypeCheckError


class TokenWeightsError(ValueError):
    """An argument that a function cannot take, with what to do about it."""


class TokenWeightsTypeError(TokenWeightsError, TypeCheckError):
    """An argument that its annotation rules out: the wrong type, dtype, shape or word.

    It is a `TypeError` too, as Python's own refusals of arguments are.
    """


E = TypeVar("E", bound=TokenWeightsError)


def invalid(
    function: str,
    argument: str,
    condition: str,
    got: Any,
    hint: str,
    *,
    error: type[E] = TokenWeightsError,
) -> E:
    """An error that says which argument of which function is wrong, how, and what to do.

    Args:
        function: Public name of the function that refuses its input.
        argument: Name of the offending argument.
        condition: What was expected of it, as a phrase that follows "expected `argument`".
        got: The value or shape that was given.
        hint: One sentence that tells the reader what to do.
        error: Class of the exception.

    Returns:
        The exception, for the caller to raise.

    Example:
        >>> str(invalid("front_fraction", "fraction", "in [0, 1]", 1.5, "Pass a share."))
        '`front_fraction`: expected `fraction` in [0, 1], got 1.5. Pass a share.'
    """
    return error(f"`{function}`: expected `{argument}` {condition}, got {got}. {hint}")


@contextmanager
def refused_by(function: str) -> Iterator[None]:
    """A context in which whatever refuses an argument, the error names this function.

    For a public function that hands its own arguments on to others, under the same names.

    Args:
        function: Public name of the function that the user has called.

    Yields:
        Nothing.

    Raises:
        TokenWeightsError: What was raised inside, under the function's name.

    Example:
        >>> try:
        ...     with refused_by("layer_agreement"):
        ...         raise invalid("bottom_fraction", "fraction", "in [0, 1]", 1.5, "Pass a share.")
        ... except TokenWeightsError as error:
        ...     print(error)
        `layer_agreement`: expected `fraction` in [0, 1], got 1.5. Pass a share.
    """
    try:
        yield
    except TokenWeightsError as error:
        _, colon, rest = str(error).partition("`: ")
        if not colon:
            raise
        own = type(error)(f"`{function}`: {rest}")
        raise own.with_traceback(error.__traceback__) from None


def nearest(value: Any, known: Sequence[str], *, cutoff: float = 0.6) -> str | None:
    """The known word that a misspelt one most looks like, or None if it looks like none.

    Args:
        value: The misspelt word.
        known: The words that there are.
        cutoff: Least share of letters that both have, in their order, in [0, 1].

    Returns:
        The word.

    Example:
        >>> nearest("normalised", ["raw", "normalized"])
        'normalized'
    """
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=cutoff)
    return near[0] if near else None


def require_state_keys(owner: str, state: Iterable[str], expected: Iterable[str]) -> None:
    """Raises unless a saved state has exactly the keys that its owner saves.

    Args:
        owner: Public name of what is restored.
        state: Keys of the given state.
        expected: Keys that `state_dict` returns.

    Raises:
        TokenWeightsError: If the keys are others.
    """
    if set(state) != set(expected):
        condition = f"with the keys {sorted(expected)}"
        hint = "Pass what `state_dict` returned."
        raise invalid(owner, "state", condition, sorted(state), hint)
