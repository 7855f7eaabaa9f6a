"""The paper's reward and metrics: boxed exact match, overlong penalty, mean@k and its relatives."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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
    if not 0 <= factor < math.inf:
        raise invalid(
            "overlong_penalty", "factor", "finite and >= 0", factor, "Its sign is built in."
        )
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
    _require_samples("mean_at_k", correct)
    return float(correct.float().mean(-1).mean())


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
    a generator of its own and leaves the global one alone. Extra memory is `resamples` x problems.

    Args:
        values: One number for each problem, for example its share of right responses.
        confidence: Coverage, in (0, 1).
        resamples: Bootstrap draws.
        seed: Seed of the draws.

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
    if resamples < 1:
        raise invalid("bootstrap_interval", "resamples", ">= 1", resamples, "Try 10,000.")
    wide = values.detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(wide), (resamples, len(wide)), generator=generator)
    tail = (1 - confidence) / 2
    bounds = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = wide[draws].mean(-1).quantile(bounds).tolist()
    return Interval(float(wide.mean()), low, high)


def _require_samples(function: str, correct: Tensor) -> None:
    if correct.numel() == 0:
        raise invalid(
            function, "correct", "with a problem and a sample", tuple(correct.shape),
            "Evaluate at least one response.",
        )  # fmt: skip


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
