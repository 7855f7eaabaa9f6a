"""What is run, the most informative first, and how a run becomes a record."""

import fcntl
import functools
import importlib
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import processor

import tokenweights as tw
from paper.arms import (
    ARMS,
    CONTROLS,
    CORE,
    FIELD,
    LAYERS,
    NEW,
    SELECTIVE,
    SOFT,
    UNTRAINED,
)
from paper.engine import ROOT
from paper.probes import first_gradients, probed
from paper.records import FOLDER, Item, append, configuration, key, read, settings_of
from paper.training import Settings, train

SEEDS = range(5)
LOCKS = ROOT / "build" / "paper" / "running"
FIRST = "first gradients"  # stands for an arm in the record of all arms' first gradients
THROUGH_TRL = ("full", "anchor20", "low2high")  # arms that are trained by TRL, too
TRL_SEEDS = range(3)


def design() -> list[Item]:
    """All items in order: core claims, the other tasks, controls, the field's rules."""

    def runs(warm_start: str, names: Any, seeds: Any = SEEDS) -> Iterator[Item]:
        return (Item(warm_start, name, seed) for seed in seeds for name in names)

    def probes(warm_start: str, seeds: Any) -> Iterator[Item]:
        return (Item(warm_start, "full", seed, probed=True) for seed in seeds)

    def again(warm_start: str) -> Iterator[Item]:
        pairs = ((name, seed) for seed in TRL_SEEDS for name in THROUGH_TRL)
        return (Item(warm_start, name, seed, engine="trl") for name, seed in pairs)

    extra = [arm.name for arm in (*SELECTIVE, *CONTROLS, *SOFT, *LAYERS) if arm.name not in CORE]
    compared = [arm.name for arm in (*FIELD, *NEW)]
    names = ("totals-0", "votes-0", "tripled-0", "totals-1")
    return [
        *(Item(name, FIRST, seed, probed=True) for name in names for seed in range(2)),
        *(*runs("totals-0", CORE), *again("totals-0"), *probes("totals-0", range(2))),
        *(item for name in names[1:] for item in (*runs(name, CORE), *probes(name, range(2)))),
        *(Item("totals-0", "explorer20", seed) for seed in range(5, 8)),
        *runs("votes-0", compared),
        *runs("tripled-0", compared),
        *runs("totals-0", extra),
        *(item for name in names for item in probes(name, range(2, 5))),
        *runs("totals-0", compared),
        *(item for name in names for item in runs(name, [UNTRAINED.name])),
    ]


def quick_design() -> list[Item]:
    """A few items that show the mechanics; too few for any verdict."""
    arms = ("full", "anchor20", "explorer20", "random20", "low2high", "predictive_high20")
    return [Item("votes-0", arm, seed) for seed in range(2) for arm in arms] + [
        Item("totals-0", "full", 0),
        Item("votes-0", "full", 0, probed=True),
        Item("votes-0", FIRST, 0, probed=True),
    ]


def quick_settings(item: Item) -> Settings:
    """The item's settings, cut to six steps and few problems."""
    return replace(settings_of(item), steps=6, problems=12, evaluated=(3, 6))


def measured(item: Item, settings: Settings) -> dict[str, Any]:
    """What the item measures."""
    if item.arm == FIRST:
        clock = time.process_time()
        found = first_gradients(item.warm_start, item.seed, settings)
        return {"first": found, "cpu_seconds": round(time.process_time() - clock, 2)}
    run = through_trl() if item.engine == "trl" else probed if item.probed else train
    return run(item.warm_start, ARMS[item.arm], item.seed, settings)


def record_of(item: Item, settings: Settings) -> dict[str, Any]:
    """Runs an item; its record, with the error in it if it fails."""
    clock, made = time.monotonic(), {} if item.arm == FIRST else configuration(item, settings)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    record = {**item.values(), "key": item_key(item, settings), "started": started, **made}
    record |= provenance(item.engine)
    try:
        record |= {"status": "finished", **measured(item, settings)}
    except Exception as error:  # a failed run is a record too, and stops no other
        last = traceback.format_exc().strip().splitlines()[-3:]
        record |= {"status": "failed", "error": repr(error)[:300], "trace": last}
    return record | {"wall_seconds": round(time.monotonic() - clock, 1)}


def item_key(item: Item, settings: Settings) -> str:
    """The key of a run, or of a table of all arms' first gradients."""
    if item.arm == FIRST:
        return f"{item.warm_start}-first-{item.seed}-{settings.prompts}x{settings.samples}"
    return key(item, settings)


def lacking(item: Item) -> str:
    """Why an item cannot be run here; empty if it can."""
    try:
        if item.engine == "trl":
            through_trl()
    except ImportError as error:
        return str(error)
    return ""


def through_trl() -> Callable[..., dict[str, Any]]:
    """Trains through TRL, which is imported only here: not everyone has it."""
    return importlib.import_module("paper.through_trl").train


@functools.cache
def provenance(engine: str = "fast") -> dict[str, Any]:
    """Commit, versions, machine and threads of this process; the code is that of its start."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    sources = ["tokenweights", "integrations/lab/src", "integrations/loop", "benchmarks/paper/*.py"]
    versions = {
        "tokenweights": tw.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if engine == "trl":
        sources.append("integrations/trl/src")
        versions["trl"] = version("trl")
    return {
        "commit": git("rev-parse", "--short=12", "HEAD") or None,
        "modified": bool(git("status", "--porcelain", "--", *sources)),
        "versions": versions,
        "machine": {"cpu": processor(), "cores": os.cpu_count()},
        "threads": torch.get_num_threads(),
    }


def finished(folder: Path) -> set[str]:
    """Keys of the records in a folder, failed ones included."""
    return {record["key"] for record in read(folder)}


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether this process has a lock; it ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def run_all(
    items: list[Item],
    *,
    folder: Path = FOLDER,
    settings: Callable[[Item], Settings] = settings_of,
    locks: Path = LOCKS,
    progress: Callable[[int, int, Item | None], None] = lambda done, total, item: None,
) -> int:
    """Runs what has no record yet; several processes share the work.

    Args:
        items: What to run, in order.
        folder: Where records are and go.
        settings: The settings of an item.
        locks: Where processes lock what they are running.
        progress: Called with the items that are done, their number, and the next one.

    Returns:
        The number of items that were run here.
    """
    ran, done = 0, finished(folder)
    names = [item_key(item, settings(item)) for item in items]
    for item, name in zip(items, names, strict=True):
        if name not in done and not lacking(item):
            provenance(item.engine)
    for item, name in zip(items, names, strict=True):
        if name in done:
            continue
        if reason := lacking(item):
            print(f"skipped: {item.arm} {item.seed} through TRL, {reason}", file=sys.stderr)
            continue
        with locked(locks / name) as mine:
            done = finished(folder)  # other processes add to it
            if not mine or name in done:
                continue
            made = settings(item)
            progress(sum(each in done for each in names), len(items), item)
            append(record_of(item, made), folder / item.file)
        ran += 1
    done = finished(folder)
    progress(sum(each in done for each in names), len(items), None)
    return ran
