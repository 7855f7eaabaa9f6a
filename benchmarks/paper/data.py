"""The records as the tables read them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paper.collapse import collapse
from paper.comparison import Paired, paired
from paper.records import read
from paper.running import FIRST, design, item_key, settings_of

WARM_STARTS = ("totals-0", "totals-1", "votes-0", "tripled-0")
Metric = Callable[[dict[str, Any]], float]


def hard(record: dict[str, Any]) -> float:
    """Accuracy on hard problems at the end."""
    return record["evaluations"][-1]["hard"]


def easy(record: dict[str, Any]) -> float:
    """Accuracy on easy problems at the end."""
    return record["evaluations"][-1]["easy"]


def average(record: dict[str, Any]) -> float:
    """Mean of easy and hard accuracy at the end."""
    return (easy(record) + hard(record)) / 2


def area(record: dict[str, Any]) -> float:
    """Mean accuracy on hard problems over the evaluations: the area under the curve."""
    values = [each["hard"] for each in record["evaluations"]]
    return sum(values) / len(values)


@dataclass(frozen=True)
class Data:
    """Finished runs, probes, first gradients, and what failed.

    Attributes:
        runs: By warm start, arm and seed.
        probes: By warm start and seed.
        first: By warm start and seed.
        trl: Runs that TRL trained, by warm start, arm and seed; in no comparison of arms.
        failed: Records of runs that failed.
        records: All records.
    """

    runs: dict[str, dict[str, dict[int, dict[str, Any]]]] = field(default_factory=dict)
    probes: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    first: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    trl: dict[str, dict[str, dict[int, dict[str, Any]]]] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def values(self, warm_start: str, arm: str, metric: Metric) -> dict[int, float]:
        """A metric of an arm by seed."""
        found = self.runs.get(warm_start, {}).get(arm, {})
        return {seed: metric(record) for seed, record in sorted(found.items())}

    def differences(
        self, warm_start: str, arm: str, other: str, metric: Metric, *, times: float = 1.0
    ) -> list[float]:
        """An arm minus `times` another one, over the seeds that both have."""
        a, b = (self.values(warm_start, name, metric) for name in (arm, other))
        return [a[seed] - times * b[seed] for seed in a if seed in b]

    def difference(self, warm_start: str, arm: str, other: str, metric: Metric) -> Paired:
        """What the differences of two arms say."""
        return paired(self.differences(warm_start, arm, other, metric))

    def collapses(self, warm_start: str, arm: str) -> tuple[int, int]:
        """Collapsed runs of an arm, and runs."""
        found = self.runs.get(warm_start, {}).get(arm, {})
        return sum(bool(collapse(run["history"])) for run in found.values()), len(found)

    def decisive(self, warm_start: str, arm: str, roles: tuple[str, ...]) -> float | None:
        """Share of an arm's weight on decisive tokens over its trainings; None without a run."""
        found = self.runs.get(warm_start, {}).get(arm, {}).values()
        weights = [run["roles"]["weight"] for run in found if run["roles"]["weight"]]
        shares = [sum(weight.get(role, 0.0) for role in roles) for weight in weights]
        return sum(shares) / len(shares) if shares else None

    def at_start(self, warm_start: str, arm: str, name: str) -> float | None:
        """Mean of an arm's first `cosine` or `projection`; None without a number."""
        found = self.first.get(warm_start, {}).values()
        values = [each["first"]["arms"].get(arm, {}).get(name) for each in found]
        numbers = [value for value in values if value is not None]
        return sum(numbers) / len(numbers) if numbers else None


def data_of(folder: Path, *, every: bool = False) -> Data:
    """Reads a folder of records.

    Args:
        folder: The folder.
        every: Also take runs that the present design does not hold.

    Returns:
        The data; of several records of one run the last one counts.
    """
    data = Data()
    wanted = {item_key(item, settings_of(item)) for item in design()}
    latest = {record["key"]: record for record in read(folder)}
    for name, record in latest.items():
        if not every and name not in wanted:
            continue
        data.records.append(record)
        warm_start, arm, seed = record["warm_start"], record["arm"], record["seed"]
        if record["status"] != "finished":
            data.failed.append(record)
        elif arm == FIRST:
            data.first.setdefault(warm_start, {})[seed] = record
        elif record.get("engine") == "trl":
            data.trl.setdefault(warm_start, {}).setdefault(arm, {})[seed] = record
        elif record["probed"]:
            data.probes.setdefault(warm_start, {})[seed] = record
        else:
            data.runs.setdefault(warm_start, {}).setdefault(arm, {})[seed] = record
    return data
