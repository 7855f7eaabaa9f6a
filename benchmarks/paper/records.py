"""Run records: one JSON line for each run or probe, failed ones included."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from paper.arms import ARMS, UNTRAINED
from paper.training import SETTINGS, Settings, task_of

FOLDER = Path(__file__).parent / "runs"
PROBES = 2  # of their definition; another one makes their runs anew


@dataclass(frozen=True)
class Item:
    """One thing to run.

    Attributes:
        warm_start: `task-number`.
        arm: Name of the arm.
        seed: Of the run.
        probed: Whether the probes run along the training; its own record then.
        engine: What trains, `fast` or `trl`.
    """

    warm_start: str
    arm: str
    seed: int
    probed: bool = False
    engine: str = "fast"

    @property
    def file(self) -> str:
        """Name of the file that holds its record."""
        if self.engine != "fast":
            return f"{self.engine}.jsonl"
        return f"{self.warm_start}{'-probes' if self.probed else ''}.jsonl"

    def values(self) -> dict[str, Any]:
        """The attributes as a record holds them; the usual engine goes without saying."""
        found = asdict(self)
        return found if self.engine != "fast" else {k: found[k] for k in found if k != "engine"}


def settings_of(item: Item) -> Settings:
    """The settings of its task; without updates where nothing is trained."""
    made = SETTINGS[task_of(item.warm_start).name]
    return replace(made, steps=0, evaluated=(0,)) if item.arm == UNTRAINED.name else made


def configuration(item: Item, settings: Settings) -> dict[str, Any]:
    """All that decides a run beside the code: settings, and the recipe as plain values."""
    arm, task = ARMS[item.arm], task_of(item.warm_start)
    made = arm.recipe(task.probe, settings.steps).to_dict()
    found = {"settings": asdict(settings), "recipe": made, "special": arm.special}
    return found | ({"probes_version": PROBES} if item.probed else {})


def key(item: Item, settings: Settings) -> str:
    """A digest that two runs share if one would repeat the other."""
    values = {**item.values(), **configuration(item, settings)}
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(folder: Path = FOLDER) -> Iterator[dict[str, Any]]:
    """All records of a folder, file by file; a line that was cut off is left out."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def append(record: dict[str, Any], path: Path) -> None:
    """Adds a record in one write, after the end of a line that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps(record, sort_keys=True) + "\n")
