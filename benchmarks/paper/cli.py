"""The commands: run, tables, one table or figure, and warm starts."""

import argparse
import multiprocessing
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from paper.figures import write_figures
from paper.records import FOLDER, Item
from paper.report import FIGURES, RESULTS, TABLES, results
from paper.running import design, quick_design, quick_settings, run_all
from paper.warm_start import MADE, make


def main(arguments: list[str] | None = None) -> None:
    """Runs a command."""
    parser = argparse.ArgumentParser(prog="benchmarks/paper", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what has no record yet, then write the tables")
    run.add_argument("--quick", action="store_true", help="a smoke test: few steps, no verdicts")
    run.add_argument("--only", help="only this warm start or engine: totals-0, or trl")
    run.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        help="processes that share the runs, one thread each; one for every core by default",
    )
    commands.add_parser("results", help="write RESULTS.md and the figures from the records")
    one = commands.add_parser("show", help="print one table, or write one figure")
    one.add_argument("name", choices=[*TABLES, *FIGURES])
    start = commands.add_parser("warm-start", help="train a warm start again")
    start.add_argument("name", choices=[*MADE])
    commands.add_parser("list", help="print what there is to run")
    given = parser.parse_args(arguments)
    _alone()
    if given.command == "run":
        _quick() if given.quick else _run(given.only, given.processes)
    elif given.command == "results":
        _write()
    elif given.command == "show":
        _show(given.name)
    elif given.command == "warm-start":
        make(given.name)
    else:
        for item in design():
            print(item.warm_start, item.arm, item.seed, _how(item))


def _alone() -> None:
    """One thread, and no bars but ours."""
    torch.set_num_threads(1)
    disable_progress_bar()  # of loading two hundred thousand parameters


def _run(only: str | None, processes: int) -> None:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    others = [context.Process(target=_share, args=(only,)) for _ in range(processes - 1)]
    for other in others:
        other.start()
    try:
        with tqdm(total=len(_items(only)), unit="run", dynamic_ncols=True) as bar:
            run_all(_items(only), progress=_shown(bar))
        for other in others:
            other.join()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    if any(other.exitcode for other in others):
        print("a process died; the same command runs what it left", file=sys.stderr)
    _write()


def _items(only: str | None) -> list[Item]:
    return [item for item in design() if only in (None, item.warm_start, item.engine)]


def _share(only: str | None) -> None:
    """What the other processes do: the same, without a word."""
    _alone()
    with suppress(KeyboardInterrupt):
        run_all(_items(only))


def _shown(bar: tqdm):
    def progress(done: int, total: int, item: Item | None) -> None:
        bar.n = done
        bar.set_postfix_str(
            f"{item.warm_start} {item.arm} {item.seed} {_how(item)}" if item else ""
        )
        bar.refresh()

    return progress


def _how(item: Item) -> str:
    return "probed" if item.probed else "through TRL" if item.engine == "trl" else ""


def _quick() -> None:
    items = quick_design()
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(items), unit="run") as bar:
        path = Path(folder)
        run_all(
            items,
            folder=path,
            settings=quick_settings,
            locks=path / "running",
            progress=_shown(bar),
        )
        print("smoke only, no verdicts\n")
        print(results(path, quick=True))


def _write() -> None:
    RESULTS.write_text(results(FOLDER))
    write_figures(FOLDER)
    print(f"wrote {RESULTS}", file=sys.stderr)


def _show(name: str) -> None:
    if name in TABLES:
        print(results(FOLDER, only=name))
    else:
        write_figures(FOLDER, only=name)
