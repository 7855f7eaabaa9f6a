"""Rules at equal mass against uniform weights: the field's, new ones, and the paper's."""

from dataclasses import dataclass, replace

from paper.arms import ARMS, CORE, FIELD, NEW
from paper.claims import LEVEL, PAIRS
from paper.comparison import Paired, holm
from paper.data import Data, area

BETTER, WORSE = "better than uniform here", "worse than uniform here"
PAPER = tuple(ARMS[name] for name in CORE if name != "full" and ARMS[name].equal_mass)


@dataclass(frozen=True)
class Judged:
    """What the runs of a rule say.

    Attributes:
        rule: Its name.
        found: Area under the curve of hard accuracy less that of uniform weights.
        p: Of the paired t test after Holm's correction over the rules; None with too few pairs.
    """

    rule: str
    found: Paired
    p: float | None

    @property
    def idle(self) -> bool:
        """Whether its runs are those of uniform weights."""
        return bool(self.found.constant and not self.found.mean)

    @property
    def words(self) -> str:
        """The verdict."""
        if self.idle:
            return "never acted here"
        if self.p is None:
            return f"not resolved ({self.found.count} of {PAIRS} pairs)"
        if self.p >= LEVEL:
            return "not resolved"
        return BETTER if self.found.mean > 0 else WORSE


def judged(data: Data, warm_start: str) -> list[Judged]:
    """All rules that have runs on a warm start."""
    runs = data.runs.get(warm_start, {})
    rules = [arm.name for arm in (*FIELD, *NEW, *PAPER) if arm.name in runs]
    found = [data.difference(warm_start, rule, "full", area) for rule in rules]
    made = [Judged(rule, each, None) for rule, each in zip(rules, found, strict=True)]
    tested = [n for n, each in enumerate(made) if each.found.count >= PAIRS and not each.idle]
    adjusted = dict(zip(tested, holm([found[n].p for n in tested]), strict=True))
    return [replace(each, p=adjusted.get(n)) for n, each in enumerate(made)]
