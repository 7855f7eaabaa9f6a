"""Put the runs of several recipes side by side: a table, and one HTML page with a figure."""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenweights._errors import invalid
from tokenweights.commands.extras import imported
from tokenweights.commands.outputs import require_output
from tokenweights.commands.terminal import aligned, shown
from tokenweights.report import (
    RecipeRun,
    comparison_html,
    recipe_comparison,
    recipe_run_from_directory,
)
from tokenweights.report.comparison_page import Table, comparison_tables

_MESSAGES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "directories",
        metavar="RUN_DIR",
        type=Path,
        nargs="+",
        help="directories as `report` reads them. Recipe and seed of a run are those of its "
        'run.json, {"recipe": NAME, "settings": {"seed": N}} or {"recipe": NAME, "seed": N}, NAME '
        "being a name or a recipe's fields; else the directory is called RECIPE-seedN or "
        "RECIPE/seedN",
    )
    parser.add_argument(
        "--metric", help="what is compared, as the run logged it (default: the reward)"
    )
    parser.add_argument(
        "--baseline",
        default="full",
        metavar="RECIPE",
        help="recipe that the others are compared with (default: full)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("compare.html"),
        help="HTML file to write (default: compare.html)",
    )


def run(options: argparse.Namespace) -> int:
    """Prints the tables, writes the page, and says what could not be read.

    Args:
        options: What was parsed.

    Returns:
        Exit status: 0 also where lines were left out.
    """
    imported("matplotlib", extra="report")
    bar = imported("tqdm", extra="report").tqdm
    messages: list[str] = []
    try:
        _require_distinct(options.directories)
        require_output("compare", options.output)
        # None: no bar where the error stream is not a terminal.
        directories = bar(
            options.directories, desc="reading", unit=" runs", disable=None, leave=False
        )
        runs = _read(directories, messages)
        comparison = recipe_comparison(runs, metric=options.metric, baseline=options.baseline)
        _write(options.output, comparison_html(comparison))
    except KeyboardInterrupt:
        print("no page was written", file=sys.stderr)
        raise
    steps = len(comparison.steps)
    print(f"read   {len(runs)} runs of {len(comparison.results)} recipes, {steps} common steps\n")
    for table in comparison_tables(comparison):
        print("\n".join(_lines(table)), end="\n\n")
    for note in comparison.notes:
        print(shown(f"note   {note}"))
    if messages:
        print(f"\n{len(messages)} could not be read and are left out:", file=sys.stderr)
        for message in messages[:_MESSAGES]:
            print(f"  {message}", file=sys.stderr)
        if len(messages) > _MESSAGES:
            print(f"  and {len(messages) - _MESSAGES} more", file=sys.stderr)
    print(shown(f"open   {options.output}"))
    return 0


def _read(directories: Iterable[Path], messages: list[str]) -> list[RecipeRun]:
    return [recipe_run_from_directory(path, unreadable=messages.append) for path in directories]


def _require_distinct(directories: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for directory in directories:
        real = os.path.realpath(directory)
        if real in seen:
            got = f"{seen[real]} and {directory}, which are one"
            raise invalid("compare", "RUN_DIR", "to be different", got, "Leave one out.")
        seen[real] = directory


def _write(output: Path, page: str) -> None:
    """Writes the page whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


def _lines(table: Table) -> list[str]:
    rows = aligned((table.heads, *table.rows))
    return [shown(table.title), f"  {table.note}", "", *rows]
