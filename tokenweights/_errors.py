"""The one exception of the library, and the one template its messages follow."""

from collections.abc import Iterable
from typing import Any


class TokenWeightsError(ValueError):
    """A value that a type annotation cannot rule out, with what to do about it."""


def invalid(function: str, argument: str, condition: str, got: Any, hint: str) -> TokenWeightsError:
    """An error that says which argument of which function is wrong, how, and what to do.

    Args:
        function: Public name of the function that refuses its input.
        argument: Name of the offending argument.
        condition: What was expected of it, as a phrase that follows "expected `argument`".
        got: The value or shape that was given.
        hint: One sentence that tells the reader what to do.

    Returns:
        The exception, for the caller to raise.

    Example:
        >>> str(invalid("front_fraction", "fraction", "in [0, 1]", 1.5, "Pass a share."))
        '`front_fraction`: expected `fraction` in [0, 1], got 1.5. Pass a share.'
    """
    return TokenWeightsError(f"`{function}`: expected `{argument}` {condition}, got {got}. {hint}")


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
