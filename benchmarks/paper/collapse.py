"""When a run counts as collapsed, fixed before any run: the paper's text has no criterion."""

from collections.abc import Sequence

WINDOW = 4  # steps at the beginning and at the end
SHORT, LONG, UNBOXED, FALL = 0.6, 1.6, 0.5, 0.3


def collapse(history: dict[str, Sequence[float]]) -> str:
    """Why a run has collapsed, or an empty string.

    Of the first and the last `WINDOW` steps: responses at the end shorter than `SHORT` or longer
    than `LONG` of those at the beginning, half of the responses without an answer, or a mean reward
    that has fallen by more than `FALL`.
    """

    def ends(name: str) -> tuple[float, float]:
        values = history[name]
        return sum(values[:WINDOW]) / WINDOW, sum(values[-WINDOW:]) / WINDOW

    (first, last), (early, late) = ends("length"), ends("reward")
    if last < SHORT * first:
        return "short responses"
    if last > LONG * first:
        return "long responses"
    if ends("unboxed")[1] > UNBOXED:
        return "no answers"
    return "reward fell" if late < early - FALL else ""
