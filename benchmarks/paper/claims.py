"""The paper's claims, and the test of each, fixed before any run.

A verdict needs five pairs. `holds here`: the difference has the claimed sign, its bootstrap
interval leaves out zero, and the paired t test stays below 0.05 after Holm's correction over all
claims of the warm start. `does not hold here`: the same for the opposite sign. A claim that two
arms are alike holds if the interval lies within the margin, and does not if the t test tells them
apart. All else is `not resolved`, with the interval.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from paper.comparison import Paired, fisher_greater, holm, paired, rank_correlation
from paper.data import Data, hard
from paper.running import design

PAIRS, LEVEL, MARGIN, KEPT = 5, 0.05, 0.05, 0.9
Values = Callable[[Data, str], list[float]]


@dataclass(frozen=True)
class Claim:
    """One claim and its test.

    Attributes:
        name: Short.
        says: What the paper says, or ours where `where` says so.
        where: In the paper.
        paper: The paper's number, where it has one.
        measured: Paired values of a warm start, whose mean is above zero where the claim is right.
        alike: Whether the claim is that the mean lies within the margin around zero.
        counted: For collapses instead: the arm that collapses more often, and the other one.
    """

    name: str
    says: str
    where: str
    paper: str
    measured: Values
    alike: bool = False
    counted: tuple[str, str] | None = None


@dataclass(frozen=True)
class Verdict:
    """What a test says of a claim."""

    claim: Claim
    words: str
    found: Paired


@dataclass(frozen=True)
class Pairs:
    """An arm minus `times` another one, by seed; a `Values`."""

    arm: str
    other: str
    times: float = 1.0

    def __call__(self, data: Data, warm_start: str) -> list[float]:
        """The differences on hard problems at the end."""
        return data.differences(warm_start, self.arm, self.other, hard, times=self.times)


def _probes(value: Callable[[list[dict]], float]) -> Values:
    """One number for each probed training, from its probes that have gradients."""

    def values(data: Data, warm_start: str) -> list[float]:
        found = data.probes.get(warm_start, {})
        numbers = [value(found[seed]["probes"]) for seed in sorted(found)]
        return [number for number in numbers if not math.isnan(number)]

    return values


def _series(probes: list[dict], group: str, name: str) -> list[float]:
    found = [probe["gradients"][group][name] for probe in probes if "gradients" in probe]
    return [value for value in found if value is not None]


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _deviation(values: list[float]) -> float:
    return statistics.pstdev(values) if len(values) > 1 else math.nan


def _random_is_closest(probes: list[dict]) -> float:
    means = {
        name: _mean(_series(probes, name, "cosine")) for name in ("random", "anchor", "explorer")
    }
    return means["random"] - max(means["anchor"], means["explorer"])


def _anchors_drift(probes: list[dict]) -> float:
    series = _series(probes, "anchor", "cosine")
    return series[0] - series[-1] if len(series) > 1 else math.nan


def _explorers_are_large(probes: list[dict]) -> float:
    return _mean(_series(probes, "explorer", "norm")) - 1


def _random_is_steady(probes: list[dict]) -> float:
    spread = {n: _deviation(_series(probes, n, "cosine")) for n in ("random", "anchor", "explorer")}
    return min(spread["anchor"], spread["explorer"]) - spread["random"]


def _weakly_related(probes: list[dict]) -> float:
    return 0.3 - _mean([abs(probe["entropies"]["correlation"]) for probe in probes])


def _anchors_need_fewer(probes: list[dict]) -> float:
    return _mean([probe["support"]["0.9"][1] - probe["support"]["0.9"][0] for probe in probes])


def _separation_stays(probes: list[dict]) -> float:
    gaps = [probe["entropies"]["mean"][1] - probe["entropies"]["mean"][0] for probe in probes]
    return gaps[-1] - gaps[0] / 2


def _upper_tenths(probes: list[dict]) -> float:
    tenths = [probe["gradients"]["tenths"] for probe in probes if "gradients" in probe]
    return _mean([sum(each[7:]) - sum(each[:3]) for each in tenths])


def _ordered_by_projection(data: Data, warm_start: str) -> list[float]:
    """Rank correlation over the hard masks of first projection and final accuracy, by seed."""
    arms = [name for name in data.runs.get(warm_start, {}) if name in MASKS]
    first = [data.at_start(warm_start, name, "projection") for name in arms]
    seeds = sorted(
        set.intersection(*(set(data.runs[warm_start][name]) for name in arms)) if arms else ()
    )
    if len(arms) < 6 or None in first:
        return []
    known = [value for value in first if value is not None]
    values = [
        rank_correlation(known, [hard(data.runs[warm_start][name][seed]) for name in arms])
        for seed in seeds
    ]
    return [value - 0.5 for value in values if not math.isnan(value)]


MASKS = (
    "random20",
    "anchor20",
    "explorer20",
    "front20",
    "back20",
    "predictive_low20",
    "predictive_high20",
)

CLAIMS = (
    Claim("random keeps", "a random 20 % keeps at least nine tenths of full training", "3.1",
          "42.60 against 43.55", Pairs("random20", "full", times=KEPT)),
    Claim("anchors trail", "anchors alone end below full training on hard problems", "3.2", "",
          Pairs("full", "anchor20")),
    Claim("explorers trail", "explorers alone end below full training", "3.2", "",
          Pairs("full", "explorer20")),
    Claim("anchors beat explorers", "anchors alone end above explorers alone", "3.2", "",
          Pairs("anchor20", "explorer20")),
    Claim("explorers collapse", "explorers alone collapse more often than all tokens", "3.2, G.3",
          "5 of 8", Pairs("full", "explorer20"), counted=("explorer20", "full")),
    Claim("random beats explorers", "random lies above explorers", "3.3", "",
          Pairs("random20", "explorer20")),
    Claim("anchors beat random", "anchors lie above random", "3.3", "",
          Pairs("anchor20", "random20")),
    Claim("any denominator", "anchors end above explorers under the all-token mean too", "G.1", "",
          Pairs("anchor20 all", "explorer20 all")),
    Claim("front fails", "the last fifth trains better than the first", "F.1", "",
          Pairs("back20", "front20")),
    Claim("back trails", "the last fifth alone ends below full training", "F.1", "",
          Pairs("full", "back20")),
    Claim("uncertain tokens suffice", "the most uncertain fifth ends where full training does",
          "5.1", "34.35 against 34.39", Pairs("predictive_high20", "full"), alike=True),
    Claim("certain tokens fail", "the least uncertain fifth ends below full training", "F.2", "",
          Pairs("full", "predictive_low20")),
    Claim("not the types", "anchors end above random tokens of the same types", "B.9, F", "",
          Pairs("anchor20", "anchor types")),
    Claim("not the places", "anchors end above random tokens of the same places", "B.9, F", "",
          Pairs("anchor20", "anchor places")),
    Claim("Low2High gains", "Low2High, with the paper's mass, ends above full training", "5.1",
          "37.15 ± 0.77 against 34.39 ± 0.47", Pairs("paper low2high", "full")),
    Claim("gain beyond mass", "Low2High at equal mass ends above full training", "5, ours", "",
          Pairs("low2high", "full")),
    Claim("order matters", "Low2High ends above High2Low on hard problems", "5.2, K.2", "",
          Pairs("low2high", "high2low")),
    Claim("static anchors are full", "a static bias to anchors ends where full training does",
          "K.2", "", Pairs("static_anchor", "full"), alike=True),
    Claim("static explorers miss hard", "a static bias to explorers gains nothing on hard problems",
          "K.2", "", Pairs("static_explorer", "full"), alike=True),
    Claim("shallow layers gain", "Low2High from the first layer ends above full training", "K.3",
          "37.40 for layer 8", Pairs("low2high L0", "full")),
    Claim("deep layers gain", "Low2High from the last layer ends above full training", "K.3", "",
          Pairs("low2high L3", "full")),
    Claim("random is closest", "random subsets have the largest cosine with the full gradient", "4",
          "", _probes(_random_is_closest)),
    Claim("anchors drift", "the anchors' cosine falls along training", "4", "0.7 at first",
          _probes(_anchors_drift)),
    Claim("explorers are large", "the explorers' gradient is longer than the full one", "4", "",
          _probes(_explorers_are_large)),
    Claim("random is steady", "the random subset's cosine varies least", "J.2", "",
          _probes(_random_is_steady)),
    Claim("not uncertainty", "attention and predictive entropy are weakly related: r within 0.3",
          "F.2", "-0.1926", _probes(_weakly_related)),
    Claim("anchors need fewer keys", "anchors gather 0.9 of their attention from fewer keys",
          "4", "", _probes(_anchors_need_fewer)),
    Claim("separation stays", "the gap of explorers and anchors keeps half of its size", "4, I", "",
          _probes(_separation_stays)),
    Claim("upper tenths carry", "the upper three tenths carry more projection than the lower three",
          "J.1", "", _probes(_upper_tenths)),
    Claim("projection orders", "first projections order hard masks: rank correlation above 0.5",
          "ours", "", _ordered_by_projection),
)  # fmt: skip


def words_of(claim: Claim, found: Paired, p: float) -> str:
    """The verdict on a claim, from its values and its corrected p-value."""
    if found.count < PAIRS:
        return f"not resolved ({found.count} of {PAIRS} pairs)"
    shown = f"({found.low:+.3f} to {found.high:+.3f}, p {p:.3f})"
    apart = p < LEVEL and not found.low <= 0 <= found.high
    if claim.alike and -MARGIN <= found.low and found.high <= MARGIN:
        return f"holds here {shown}"
    if not apart:
        return f"not resolved {shown}"
    holds = found.mean > 0 and not claim.alike
    return f"{'holds' if holds else 'does not hold'} here {shown}"


def in_design(claim: Claim, arms: set[str]) -> bool:
    """Whether the arms of a warm start are those that a claim needs."""
    needed = claim.measured
    return not isinstance(needed, Pairs) or {needed.arm, needed.other} <= arms


def counted_words(data: Data, warm_start: str, arms: tuple[str, str]) -> str:
    """The verdict on a claim of collapses, by Fisher's exact test."""
    (hits, runs), (others, other_runs) = (data.collapses(warm_start, arm) for arm in arms)
    shown = f"({hits} of {runs} against {others} of {other_runs})"
    if min(runs, other_runs) < PAIRS:
        return f"not resolved {shown}"
    if fisher_greater(hits, runs, others, other_runs) < LEVEL:
        return f"holds here {shown}"
    if hits == 0:
        return f"does not hold here {shown}"
    return f"not resolved {shown}"


def verdicts(data: Data, warm_start: str) -> list[Verdict]:
    """The verdicts of a warm start, in the order of the claims."""
    found = [paired(claim.measured(data, warm_start)) for claim in CLAIMS]
    tested = [n for n, claim in enumerate(CLAIMS) if not claim.counted and found[n].count >= PAIRS]
    adjusted = dict(zip(tested, holm([found[n].p for n in tested]), strict=True))
    arms = {item.arm for item in design() if item.warm_start == warm_start}
    made = []
    for number, claim in enumerate(CLAIMS):
        if not in_design(claim, arms):
            words = "cannot be tested here (arm not run on this warm start)"
        elif claim.counted:
            words = counted_words(data, warm_start, claim.counted)
        else:
            words = words_of(claim, found[number], adjusted.get(number, 1.0))
        made.append(Verdict(claim, words, found[number]))
    return made
