"""Comparisons: paired ones with interval and t test, Welch's of two groups, Holm's correction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

import tokenweights as tw

CONFIDENCE, RESAMPLES = 0.95, 4000
DIGITS = 2e-4  # records hold four of them


@dataclass(frozen=True)
class Paired:
    """Differences of two arms over the seeds that both have.

    Attributes:
        count: Pairs.
        mean: Mean difference.
        low: Lower end of the bootstrap interval over pairs.
        high: Its upper end.
        p: Two-sided p-value of the paired t test; 1 where there are fewer than three pairs.
        reach: Half of Student's interval around the mean; infinite with a single pair.
        constant: Whether all differences are the same, as far as the records' digits go.
    """

    count: int
    mean: float
    low: float
    high: float
    p: float
    reach: float = math.inf
    constant: bool = False


def t_tail(t: float, freedom: int) -> float:
    """Probability that Student's t lies beyond `|t|` on either side.

    By the finite series of Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    angle = math.atan2(abs(t), math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = total = cosine if freedom % 2 else 1.0
    for number in range(3 if freedom % 2 else 2, freedom - 1, 2):
        term *= cosine**2 * (number - 1) / number
        total += term
    if freedom % 2 == 0:
        return max(0.0, 1 - sine * total)
    inside = angle + (sine * total if freedom > 1 else 0.0)
    return max(0.0, 1 - 2 / math.pi * inside)


def paired(differences: Sequence[float]) -> Paired:
    """What a list of paired differences says."""
    count = len(differences)
    if not count:
        return Paired(0, math.nan, math.nan, math.nan, 1.0)
    values = torch.tensor(differences, dtype=torch.float64)
    interval = tw.bootstrap_interval(values, confidence=CONFIDENCE, resamples=RESAMPLES, seed=0)
    found = Paired(count, interval.mean, interval.low, interval.high, 1.0)
    if count < 2:
        return found
    spread = values.std().item() / math.sqrt(count)
    constant = (values.max() - values.min()).item() <= DIGITS
    found = replace(found, reach=t_quantile(count - 1) * spread, constant=constant)
    if count < 3:
        return found
    p = t_tail(found.mean / spread, count - 1) if spread > 0 else float(found.mean == 0)
    return replace(found, p=p)


def welch(first: Sequence[float], second: Sequence[float]) -> tw.Interval:
    """The difference of the means of two groups, at least two values in each.

    Degrees of freedom are rounded down, which widens the interval.
    """
    groups = [torch.tensor(values, dtype=torch.float64) for values in (first, second)]
    mean = (groups[0].mean() - groups[1].mean()).item()
    parts = [(values.var() / len(values)).item() for values in groups]
    if not sum(parts):
        return tw.Interval(mean, mean, mean)
    terms = [part**2 / (len(values) - 1) for part, values in zip(parts, groups, strict=True)]
    reach = t_quantile(int(sum(parts) ** 2 / sum(terms) + 1e-9)) * math.sqrt(sum(parts))
    return tw.Interval(mean, mean - reach, mean + reach)


def t_quantile(freedom: int) -> float:
    """The t that is exceeded on either side with a probability of 1 less `CONFIDENCE`."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        beyond = t_tail(middle, freedom) > 1 - CONFIDENCE
        low, high = (middle, high) if beyond else (low, middle)
    return high


def holm(values: Sequence[float]) -> list[float]:
    """P-values after Holm's step-down correction, in the order given."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    adjusted, largest = [1.0] * len(values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, values[place] * (len(values) - rank)))
        adjusted[place] = largest
    return adjusted


def fisher_greater(hits: int, runs: int, other_hits: int, other_runs: int) -> float:
    """Probability of at least as many hits in the first group, given all hits (Fisher)."""
    total, marked = runs + other_runs, hits + other_hits
    ways = math.comb(total, marked)
    most = min(runs, marked)
    found = sum(
        math.comb(runs, k) * math.comb(other_runs, marked - k) for k in range(hits, most + 1)
    )
    return found / ways


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation of two lists, ties at their mean rank."""
    return torch.corrcoef(torch.stack([_ranks(first), _ranks(second)]))[0, 1].item()


def _ranks(values: Sequence[float]) -> torch.Tensor:
    column = torch.tensor(values, dtype=torch.float64)
    below = (column[None] < column[:, None]).sum(1)
    equal = (column[None] == column[:, None]).sum(1)
    return below + (equal - 1) / 2
