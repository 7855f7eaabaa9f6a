"""The commands: run, tables, one table or figure, and warm starts."""

import argparse
import sys
import tempfile
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
    commands.add_parser("results", help="write RESULTS.md and the figures from the records")
    one = commands.add_parser("show", help="print one table, or write one figure")
    one.add_argument("name", choices=[*TABLES, *FIGURES])
    start = commands.add_parser("warm-start", help="train a warm start again")
    start.add_argument("name", choices=[*MADE])
    commands.add_parser("list", help="print what there is to run")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    disable_progress_bar()  # of loading two hundred thousand parameters
    if given.command == "run":
        _quick() if given.quick else _run(given.only)
    elif given.command == "results":
        _write()
    elif given.command == "show":
        _show(given.name)
    elif given.command == "warm-start":
        make(given.name)
    else:
        for item in design():
            print(item.warm_start, item.arm, item.seed, _how(item))


def _run(only: str | None) -> None:
    items = [item for item in design() if only in (None, item.warm_start, item.engine)]
    with tqdm(total=len(items), unit="run", dynamic_ncols=True) as bar:
        run_all(items, progress=_shown(bar))
    _write()


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
            claims=path / "running",
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
