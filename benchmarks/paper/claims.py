"""The paper's claims, and the test of each.

A verdict needs five pairs. `holds here`: the paired t test of the claimed quantity stays below 0.05
after Holm's correction over the claims of the warm start, and the mean has the claimed sign.
`does not hold here`: the same with the opposite sign. A claim with bounds (two arms are alike, or
one gains nothing) holds if Student's interval lies within them, does not hold if it lies outside,
and is in no correction. All else is `not resolved`.

Most tests were fixed before any run. Those marked `later` were added or changed after a first look
at the records, because the paper says more, or something else, than the first test asked.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from paper.collapse import collapse
from paper.comparison import Paired, fisher_greater, holm, paired, rank_correlation
from paper.data import Data, Metric, average, hard
from paper.running import design

PAIRS, LEVEL, MARGIN, KEPT = 5, 0.05, 0.05, 0.9
NOT_RUN = "not run on this warm start"
ALIKE, NO_GAIN = (-MARGIN, MARGIN), (-math.inf, MARGIN)
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
        bounds: Where the claim says that the mean lies, if not above zero.
        counted: For collapses instead: the arm that collapses more often, and the other one.
        later: Whether its test is younger than the first records.
    """

    name: str
    says: str
    where: str
    paper: str
    measured: Values
    bounds: tuple[float, float] | None = None
    counted: tuple[str, str] | None = None
    later: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a test says of a claim."""

    claim: Claim
    words: str
    found: Paired

    @property
    def kind(self) -> str:
        """The words without their numbers."""
        return self.words.partition(" (")[0]


@dataclass(frozen=True)
class Pairs:
    """An arm minus `times` another one at the end, by seed; a `Values`."""

    arm: str
    other: str
    times: float = 1.0
    metric: Metric = hard

    @property
    def arms(self) -> set[str]:
        """The arms it needs."""
        return {self.arm, self.other}

    def __call__(self, data: Data, warm_start: str) -> list[float]:
        """The differences."""
        return data.differences(warm_start, self.arm, self.other, self.metric, times=self.times)


@dataclass(frozen=True)
class Survivors(Pairs):
    """The same over the seeds at which the first arm has not collapsed."""

    def __call__(self, data: Data, warm_start: str) -> list[float]:
        """The differences."""
        runs = data.runs.get(warm_start, {})
        mine, others = runs.get(self.arm, {}), runs.get(self.other, {})
        return [
            self.metric(mine[seed]) - self.metric(others[seed])
            for seed in sorted(mine.keys() & others.keys())
            if not collapse(mine[seed]["history"])
        ]


@dataclass(frozen=True)
class Several:
    """A number from the hard accuracies of several arms, by seed; a `Values`."""

    names: tuple[str, ...]
    value: Callable[..., float]

    @property
    def arms(self) -> set[str]:
        """The arms it needs."""
        return set(self.names)

    def __call__(self, data: Data, warm_start: str) -> list[float]:
        """The number of each seed that all arms have."""
        columns = [data.values(warm_start, name, hard) for name in self.names]
        seeds = sorted(set.intersection(*map(set, columns)))
        return [self.value(*(column[seed] for column in columns)) for seed in seeds]


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
    return _mean(_series(probes, "explorer", "norm")) - _mean(_series(probes, "random", "norm"))


def _deviations(probes: list[dict]) -> dict[str, float]:
    names = ("random", "anchor", "explorer")
    return {name: _deviation(_series(probes, name, "cosine")) for name in names}


def _random_is_steady(probes: list[dict]) -> float:
    found = _deviations(probes)
    return min(found["anchor"], found["explorer"]) - found["random"]


def _anchors_vary_most(probes: list[dict]) -> float:
    found = _deviations(probes)
    return found["anchor"] - max(found["random"], found["explorer"])


def _weakly_related(probes: list[dict]) -> float:
    return 0.3 - _mean([abs(probe["entropies"]["correlation"]) for probe in probes])


def _anchors_need_fewer(probes: list[dict]) -> float:
    return _mean([probe["support"]["0.9"][1] - probe["support"]["0.9"][0] for probe in probes])


def _separation_stays(probes: list[dict]) -> float:
    gaps = [probe["entropies"]["mean"][1] - probe["entropies"]["mean"][0] for probe in probes]
    return gaps[-1] - gaps[0] / 2


def _upper_tenths(probes: list[dict]) -> float:
    """By their share of the tokens: tenths of short responses are not of one size."""

    def per_share(found: dict, part: slice) -> float:
        return sum(found["tenths"][part]) / sum(found["tenth_shares"][part])

    held = [probe["gradients"] for probe in probes if "gradients" in probe]
    upper, lower = slice(7, None), slice(None, 3)
    return _mean([per_share(each, upper) - per_share(each, lower) for each in held])


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
    Claim("explorers trail", "explorers alone end below full training (in the paper by collapse)",
          "3.2", "", Pairs("full", "explorer20")),
    Claim("survivors gain", "explorer runs that do not collapse end above full training", "3.2",
          "12.31 ± 0.53 against 5.83 ± 0.89", Survivors("explorer20", "full"), later=True),
    Claim("anchors beat explorers", "anchors alone end above explorers alone", "3.2", "",
          Pairs("anchor20", "explorer20")),
    Claim("explorers collapse", "explorers alone collapse more often than all tokens", "3.2, G.3",
          "5 of 8", Pairs("full", "explorer20"), counted=("explorer20", "full")),
    Claim("random beats explorers", "random lies above explorers", "3.3", "",
          Pairs("random20", "explorer20")),
    Claim("anchors beat random", "anchors lie above random", "3.3", "",
          Pairs("anchor20", "random20")),
    Claim("front fails", "the last fifth trains better than the first", "F.1", "",
          Pairs("back20", "front20")),
    Claim("back trails", "the last fifth alone ends below full training", "F.1", "",
          Pairs("full", "back20")),
    Claim("uncertain tokens suffice", "the most uncertain fifth keeps the average of full training",
          "5.1", "34.35 against 34.39", Pairs("predictive_high20", "full", metric=average),
          bounds=ALIKE, later=True),
    Claim("uncertain tokens miss hard", "the most uncertain fifth loses on hard problems", "5.1",
          "AIME falls to 1.84", Pairs("full", "predictive_high20"), later=True),
    Claim("certain tokens fail", "the least uncertain fifth ends below full training", "F.2", "",
          Pairs("full", "predictive_low20")),
    Claim("another asymmetry", "anchors lead explorers by more than certain tokens uncertain ones",
          "F.2", "", Several(("anchor20", "explorer20", "predictive_low20", "predictive_high20"),
                             lambda a, e, low, high: (a - e) - (low - high)), later=True),
    Claim("not the types", "anchors end above random tokens of the same types",
          "ours, with the controls of B.9", "", Pairs("anchor20", "anchor types")),
    Claim("not the places", "anchors end above random tokens of the same places",
          "ours, with the controls of B.9", "", Pairs("anchor20", "anchor places")),
    Claim("Low2High gains", "Low2High, with the paper's mass, ends above full training", "5.1",
          "37.15 ± 0.77 against 34.39 ± 0.47", Pairs("paper low2high", "full")),
    Claim("gain beyond mass", "Low2High at equal mass ends above full training", "5, ours", "",
          Pairs("low2high", "full")),
    Claim("order matters", "Low2High ends above High2Low on hard problems", "5.2, K.2", "",
          Pairs("low2high", "high2low")),
    Claim("High2Low gains too", "High2Low ends above full training on the average", "5.2, K.2", "",
          Pairs("high2low", "full", metric=average), later=True),
    Claim("dynamic beats static", "Low2High ends above both static biases", "5.2, K.2", "",
          Several(("low2high", "static_anchor", "static_explorer"),
                  lambda moving, anchor, explorer: moving - max(anchor, explorer)), later=True),
    Claim("static anchors are full", "a static bias to anchors ends where full training does",
          "K.2", "", Pairs("static_anchor", "full"), bounds=ALIKE),
    Claim("static explorers miss hard", "a static bias to explorers gains nothing on hard problems",
          "K.2", "", Pairs("static_explorer", "full"), bounds=NO_GAIN, later=True),
    Claim("shallow layers gain", "Low2High from the first layer, at equal mass, ends above full "
          "training", "K.3", "37.40 for layer 8", Pairs("low2high L0", "full")),
    Claim("deep layers gain", "Low2High from the last layer, at equal mass, ends above full "
          "training", "K.3", "", Pairs("low2high L3", "full")),
    Claim("random is closest", "random subsets have the largest cosine with the full gradient", "4",
          "", _probes(_random_is_closest)),
    Claim("anchors drift", "the anchors' cosine falls along training", "4", "0.7 at first",
          _probes(_anchors_drift)),
    Claim("explorers are large", "the explorers' gradient is longer than that of random tokens",
          "4", "", _probes(_explorers_are_large), later=True),
    Claim("random is steady", "the random subset's cosine varies least", "J.2", "",
          _probes(_random_is_steady)),
    Claim("anchors vary most", "the anchors' cosine varies most", "J.2", "",
          _probes(_anchors_vary_most), later=True),
    Claim("not uncertainty", "attention and predictive entropy are weakly related: r within 0.3",
          "F.2", "-0.1926", _probes(_weakly_related)),
    Claim("anchors need fewer keys", "anchors gather 0.9 of their attention from fewer keys",
          "4", "", _probes(_anchors_need_fewer)),
    Claim("separation stays", "the gap of explorers and anchors keeps half of its size", "4, I", "",
          _probes(_separation_stays)),
    Claim("upper tenths carry", "a token of the upper three tenths carries more projection than "
          "one of the lower three", "J.1", "", _probes(_upper_tenths), later=True),
    Claim("projection orders", "first projections order hard masks: rank correlation above 0.5",
          "ours", "", _ordered_by_projection),
)  # fmt: skip


def words_of(claim: Claim, found: Paired, p: float) -> str:
    """The verdict on a claim, from its values and its corrected p-value."""
    if found.count < PAIRS:
        return f"not resolved ({found.count} of {PAIRS} pairs)"
    low, high = found.mean - found.reach, found.mean + found.reach
    shown = f"{low:+.3f} to {high:+.3f}" if not found.constant else f"{found.mean:+.3f} in all runs"
    if claim.bounds:
        below, above = claim.bounds
        if below <= low and high <= above:
            return f"holds here ({shown})"
        outside = high < below or low > above
        return f"{'does not hold here' if outside else 'not resolved'} ({shown})"
    shown += "" if found.constant else f", p {p:.3f}" if p >= 0.001 else ", p < 0.001"
    if p >= LEVEL:
        return f"not resolved ({shown})"
    return f"{'holds' if found.mean > 0 else 'does not hold'} here ({shown})"


def in_design(claim: Claim, arms: set[str]) -> bool:
    """Whether the arms of a warm start are those that a claim needs."""
    needed = claim.measured
    return not isinstance(needed, Pairs | Several) or needed.arms <= arms


def counted_words(data: Data, warm_start: str, arms: tuple[str, str]) -> str:
    """The verdict on a claim of collapses, by Fisher's exact test.

    Where nothing collapses nothing is refuted either: what is left is the largest rate that the
    runs do not exclude.
    """
    (hits, runs), (others, other_runs) = (data.collapses(warm_start, arm) for arm in arms)
    shown = f"{hits} of {runs} against {others} of {other_runs}"
    if min(runs, other_runs) < PAIRS:
        return f"not resolved ({shown})"
    if fisher_greater(hits, runs, others, other_runs) < LEVEL:
        return f"holds here ({shown})"
    if hits == 0:
        shown += f"; rates above {1 - LEVEL ** (1 / runs):.2f} are excluded"
    return f"not resolved ({shown})"


def verdicts(data: Data, warm_start: str) -> list[Verdict]:
    """The verdicts of a warm start, in the order of the claims."""
    found = [paired(claim.measured(data, warm_start)) for claim in CLAIMS]
    tested = [
        place
        for place, claim in enumerate(CLAIMS)
        if not claim.counted and not claim.bounds and found[place].count >= PAIRS
    ]
    adjusted = dict(zip(tested, holm([found[place].p for place in tested]), strict=True))
    arms = {item.arm for item in design() if item.warm_start == warm_start}
    made = []
    for place, claim in enumerate(CLAIMS):
        if not in_design(claim, arms):
            words = NOT_RUN
        elif claim.counted:
            words = counted_words(data, warm_start, claim.counted)
        else:
            words = words_of(claim, found[place], adjusted.get(place, 1.0))
        made.append(Verdict(claim, words, found[place]))
    return made
