"""The paper's reward and metric: boxed exact match, overlong penalty, mean@k."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed

NO_BOX, WRONG, RIGHT = -2.0, -1.0, 1.0

_BOX = "\\boxed{"


@typed
def boxed_answer(response: str) -> str | None:
    r"""The content of the last closed `\boxed{...}` of a response, stripped of outer white space.

    Braces nest; an escaped brace, `\{` or `\}`, is text. A box that never closes is no box.

    Args:
        response: A response's text.

    Returns:
        The content, or None if there is no closed box.

    Example:
        >>> boxed_answer(r"first \boxed{1}, no: \boxed{\frac{1}{2}}, or \boxed{3")
        '\\frac{1}{2}'
    """
    start = response.rfind(_BOX)
    while start >= 0:
        content = _braced(response, start + len(_BOX))
        if content is not None:
            return content.strip()
        start = response.rfind(_BOX, 0, start)
    return None


@typed
def boxed_match_reward(response: str, answer: str) -> float:
    r"""Reward of a response by exact match of its last boxed answer (Appendix B.4).

    Args:
        response: A response's text.
        answer: The reference answer; outer white space is ignored.

    Returns:
        -2 without a closed `\boxed{...}`, -1 for another answer, 1 for this one.

    Example:
        >>> [boxed_match_reward(text, "42") for text in (r"\boxed{42}", r"\boxed{4}", "42")]
        [1.0, -1.0, -2.0]
    """
    found = boxed_answer(response)
    if found is None:
        return NO_BOX
    return RIGHT if found == answer.strip() else WRONG


@typed
def overlong_penalty(
    lengths: Int[Tensor, " batch"], *, max_length: int, buffer_length: int, factor: float = 1.0
) -> Float[Tensor, " batch"]:
    r"""DAPO's soft penalty on long responses, to be added to the reward.

    0 up to `max_length - buffer_length` tokens, then a straight line down to `-factor` at
    `max_length`, and on beyond: $\min(0, (L_{max} - B - L) / B) \cdot$ factor.

    Args:
        lengths: Tokens of each response.
        max_length: Longest response allowed.
        buffer_length: Length of the zone in which the penalty grows.
        factor: Size of the penalty at `max_length`.

    Returns:
        Penalties <= 0.

    Raises:
        TokenWeightsError: If not 0 < `buffer_length` <= `max_length`, or `factor` is negative.

    Example:
        >>> overlong_penalty(torch.tensor([80, 95, 100]), max_length=100, buffer_length=10)
        tensor([ 0.0000, -0.5000, -1.0000])
    """
    if not 0 < buffer_length <= max_length:
        raise invalid(
            "overlong_penalty",
            "buffer_length",
            f"in (0, {max_length}]",
            buffer_length,
            "It is the last part of `max_length`.",
        )
    if factor < 0:
        raise invalid("overlong_penalty", "factor", ">= 0", factor, "Its sign is built in.")
    return ((max_length - buffer_length - lengths) / buffer_length * factor).clamp(max=0.0)


@typed
def mean_at_k(correct: Bool[Tensor, "problem sample"]) -> float:
    """Mean correctness over the samples of each problem, then over problems (Appendix B.6).

    Args:
        correct: True where a sampled response is right.

    Returns:
        A share in [0, 1].

    Raises:
        TokenWeightsError: If there is no problem or no sample.

    Example:
        >>> mean_at_k(torch.tensor([[True, False], [True, True]]))
        0.75
    """
    if correct.numel() == 0:
        raise invalid(
            "mean_at_k", "correct", "with a problem and a sample", tuple(correct.shape),
            "Evaluate at least one response.",
        )  # fmt: skip
    return float(correct.float().mean(-1).mean())


def _braced(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes the one before it, or None."""
    depth, place = 1, start
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
        place += 1
    return None
