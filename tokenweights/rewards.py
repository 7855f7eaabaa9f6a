"""The paper's reward and metrics: boxed exact match, overlong penalty, mean@k and its relatives."""

import contextlib
import math
import operator
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import accumulate
from numbers import Rational, Real

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed

NO_BOX, WRONG, RIGHT = -2.0, -1.0, 1.0

_BOX = "\\boxed{"


@typed
def boxed_answer(response: str) -> str | None:
    r"""The content of the last closed `\boxed{...}` of a response, stripped of outer white space.

    Braces nest; an escaped brace, `\{` or `\}`, is text. A box that never closes is no box. Work is
    linear in the length of the response, whatever a policy repeats.

    Args:
        response: A response's text.

    Returns:
        The content, or None if there is no closed box.

    Example:
        >>> boxed_answer(r"first \boxed{1}, no: \boxed{\frac{1}{2}}, or \boxed{3")
        '\\frac{1}{2}'
    """
    # A closed box with another one inside is not the last, for the inner one is closed too. So no
    # box is read beyond the next, and of pieces that repeat, one is read.
    for piece in dict.fromkeys(reversed(response.split(_BOX)[1:])):
        end = _closing_brace(piece)
        if end is not None:
            return piece[:end].strip()
    return None


@typed
def reference_answer(answer: object, *, place: str = "") -> str:
    """The reference answer of a problem as text, whatever type a dataset keeps it in.

    Whole numbers are written without a fraction, others in full and without an exponent: 7 and 7.0
    are `7`, and 1e-7 is `0.0000001`.

    Args:
        answer: Text or a number: an int, a float, a fraction, a decimal, or a scalar of NumPy.
        place: Where it stands, for the message of the error.

    Returns:
        Its text, without outer white space.

    Raises:
        TokenWeightsError: If it is blank, not finite, neither text nor a number (None, a bool, a
            list), or a whole float of 2**53 or more, of which the last digits are lost.

    Example:
        >>> [reference_answer(answer) for answer in (" x^2", 7, 7.0, -0.5)]
        ['x^2', '7', '7', '-0.5']
    """
    text = _written(answer)
    if not text:
        got = f"{answer!r} ({place})" if place else repr(answer)
        hint = "Leave the problem out, or write its answer as text."
        raise invalid("reference_answer", "answer", "to be text or a finite number", got, hint)
    return text


@typed
def boxed_match_reward(response: str, answer: object) -> float:
    r"""Reward of a response by exact match of its last boxed answer (Appendix B.4).

    Args:
        response: A response's text.
        answer: The reference answer, text or a number: what `reference_answer` takes.

    Returns:
        -2 without a closed `\boxed{...}`, -1 for another answer, 1 for this one.

    Raises:
        TokenWeightsError: If the reference cannot be an answer.

    Example:
        >>> [boxed_match_reward(text, "42") for text in (r"\boxed{42}", r"\boxed{4}", "42")]
        [1.0, -1.0, -2.0]
    """
    right, found = reference_answer(answer), boxed_answer(response)
    if found is None:
        return NO_BOX
    return RIGHT if found == right else WRONG


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
        Penalties <= 0, in float32.

    Raises:
        TokenWeightsError: If not 0 < `buffer_length` <= `max_length` < 2**63, or `factor` is
            negative or not finite.

    Example:
        >>> overlong_penalty(torch.tensor([80, 95, 100]), max_length=100, buffer_length=10)
        tensor([ 0.0000, -0.5000, -1.0000])
    """
    if not 0 < max_length < 2**63:
        hint = "It is a number of tokens."
        raise invalid("overlong_penalty", "max_length", "in (0, 2**63)", max_length, hint)
    if not 0 < buffer_length <= max_length:
        raise invalid(
            "overlong_penalty",
            "buffer_length",
            f"in (0, {max_length}]",
            buffer_length,
            "It is the last part of `max_length`.",
        )
    if not 0 <= factor < math.inf:
        raise invalid(
            "overlong_penalty", "factor", "finite and >= 0", factor, "Its sign is built in."
        )
    # Narrow integers would wrap around, and the quotient of integers has the default dtype.
    left = (max_length - buffer_length - lengths.long()).float()
    return (left / buffer_length * factor).clamp(max=0.0)


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
    _require_samples("mean_at_k", correct)
    return int(correct.sum()) / correct.numel()


@typed
def pass_at_k(correct: Bool[Tensor, "problem sample"], *, k: int) -> float:
    r"""Chance that at least one of k responses is right, the mean over problems.

    Of n samples, c are right: $1 - \binom{n - c}{k} / \binom{n}{k}$, which estimates the chance
    without bias from n >= k samples.

    Args:
        correct: True where a sampled response is right.
        k: Responses drawn, at most the number of samples.

    Returns:
        A share in [0, 1].

    Raises:
        TokenWeightsError: If there is no problem or no sample, or k is out of range.

    Example:
        >>> pass_at_k(torch.tensor([[True, False, False, False]]), k=2)
        0.5
    """
    _require_samples("pass_at_k", correct)
    samples = correct.shape[1]
    if not 1 <= k <= samples:
        raise invalid("pass_at_k", "k", f"in [1, {samples}]", k, "Sample more responses.")
    total = math.comb(samples, k)
    shares = [1 - math.comb(samples - right, k) / total for right in correct.sum(-1).tolist()]
    return sum(shares) / len(shares)


@typed
def majority_at_k(answers: Sequence[Sequence[str | None]], references: Sequence[str]) -> float:
    """Share of problems whose most frequent answer is right.

    Responses without an answer do not vote. Of answers that tie for the most votes each counts in
    equal parts, so the value does not depend on the order of the samples.

    Args:
        answers: The answer of every sample of every problem; None without one.
        references: The right answer of each problem.

    Returns:
        A share in [0, 1].

    Raises:
        TokenWeightsError: If there is no problem, or the lengths differ.

    Example:
        >>> majority_at_k([["4", "4", "5"], ["1", "2", None]], ["4", "1"])
        0.75
    """
    if not answers or len(answers) != len(references):
        raise invalid(
            "majority_at_k",
            "answers",
            f"for each of the {len(references)} references, and at least one",
            f"{len(answers)} problems",
            "Pass the answers and the reference of every problem.",
        )
    shares = []
    for votes, reference in zip(answers, references, strict=True):
        counts = Counter(answer for answer in votes if answer is not None)
        most = max(counts.values(), default=0)
        winners = [answer for answer, count in counts.items() if count == most]
        shares.append((reference in winners) / max(len(winners), 1))
    return sum(shares) / len(shares)


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its confidence interval.

    Attributes:
        mean: The estimate.
        low: Lower bound.
        high: Upper bound.
    """

    mean: float
    low: float
    high: float


@typed
def bootstrap_interval(
    values: Float[Tensor, " problem"],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean over problems with a percentile bootstrap interval; problems are drawn, not samples.

    Samples of one problem depend on each other, so the problem is what is drawn again. The draw has
    a generator of its own and leaves the global one alone. Extra memory is 32 MiB, or 16 bytes for
    each problem if that is more.

    Args:
        values: One number for each problem, for example its share of right responses.
        confidence: Coverage, in (0, 1).
        resamples: Bootstrap draws, at most 10 million.
        seed: Seed of the draws, as `torch.manual_seed` takes it.

    Returns:
        The mean and its interval.

    Raises:
        TokenWeightsError: If there is no problem, a value is not finite, or an option is out of
            range.

    Example:
        >>> interval = bootstrap_interval(torch.tensor([0.0, 1.0, 1.0, 1.0]))
        >>> interval.mean, interval.low, interval.high
        (0.75, 0.25, 1.0)
    """
    if values.numel() == 0 or not bool(torch.isfinite(values).all()):
        raise invalid(
            "bootstrap_interval", "values", "finite, for at least one problem", values.tolist(),
            "Evaluate a problem.",
        )  # fmt: skip
    if not 0 < confidence < 1:
        raise invalid("bootstrap_interval", "confidence", "in (0, 1)", confidence, "Try 0.95.")
    if not 1 <= resamples <= 10_000_000:
        condition = "in [1, 10,000,000]"
        raise invalid("bootstrap_interval", "resamples", condition, resamples, "Try 10,000.")
    if not -(2**63) <= seed < 2**64:
        hint = "Pass a smaller seed."
        raise invalid("bootstrap_interval", "seed", "in [-2**63, 2**64)", seed, hint)
    wide = values.detach().cpu().double()
    generator = torch.Generator("cpu").manual_seed(seed)
    means = []
    rows = max(1, _DRAWS // len(wide))
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), len(wide))
        draws = torch.randint(len(wide), shape, generator=generator, device="cpu")
        means.append(wide[draws].mean(-1))
    tail = (1 - confidence) / 2
    bounds = torch.tensor([tail, 1 - tail], dtype=torch.float64, device="cpu")
    low, high = torch.cat(means).quantile(bounds).tolist()
    return Interval(float(wide.mean()), low, high)


def _require_samples(function: str, correct: Tensor) -> None:
    if correct.numel() == 0:
        raise invalid(
            function, "correct", "with a problem and a sample", tuple(correct.shape),
            "Evaluate at least one response.",
        )  # fmt: skip


def _written(answer: object) -> str:
    """An answer as text, which is blank if it cannot be one."""
    if isinstance(answer, str):
        return answer.strip()
    if isinstance(answer, bool) or not isinstance(answer, Real | Decimal):
        return ""
    if isinstance(answer, Rational):  # whole numbers, NumPy's too
        return str(answer)
    if not math.isfinite(answer) or (isinstance(answer, Real) and abs(float(answer)) >= 2**53):
        return ""
    text = format(Decimal(str(answer)), "f") if answer else "0"  # not -0
    return text.rstrip("0").rstrip(".") if "." in text else text


def _closing_brace(text: str) -> int | None:
    """Where the brace stands that closes one open before the text, or None."""
    if "}" not in text:
        return None
    braces = text.encode("ascii", "replace")  # one byte for each character
    for escaped in (b"\\\\", b"\\{", b"\\}"):
        braces = braces.replace(escaped, b"  ")
    depth = 0
    for start in range(0, len(braces), _BLOCK):
        block = braces[start : start + _BLOCK]
        closing = block.count(b"}")
        if closing > depth:  # without so many it cannot close the brace
            depths = accumulate(array("b", block.translate(_STEPS)))
            with contextlib.suppress(ValueError):
                return start + operator.indexOf(depths, -1 - depth)
        depth += block.count(b"{") - closing
    return None


_BLOCK = 4096  # characters at a time
_DRAWS = 2**21  # at a time
# What each byte adds to the depth, as a signed byte: 255 is -1.
_STEPS = bytes({ord("{"): 1, ord("}"): 255}.get(byte, 0) for byte in range(256))
