"""Turn the directory of a run into one HTML report."""

import argparse
import sys
from functools import partial
from pathlib import Path

from tokenweights.commands.extras import imported
from tokenweights.report import run_from_directory, run_report_html

_MESSAGES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "directory",
        metavar="RUN_DIR",
        type=Path,
        help="directory with metrics.jsonl (or trainer_state.json), tokens.jsonl, gradient.jsonl",
    )
    parser.add_argument(
        "--output", type=Path, help="HTML file to write (default: RUN_DIR/report.html)"
    )


def run(options: argparse.Namespace) -> int:
    """Writes the report and says where it is, and what could not be read.

    Args:
        options: What was parsed.

    Returns:
        Exit status: 0 also where lines were left out, for the report exists and names them.
    """
    imported("matplotlib", extra="report")
    bar = imported("tqdm", extra="report").tqdm
    messages: list[str] = []
    found = run_from_directory(
        options.directory,
        unreadable=messages.append,
        progress=partial(bar, desc="reading token records", unit=" responses"),
    )
    page = run_report_html(found, progress=partial(bar, desc="drawing", unit=" figures"))
    output = options.output or options.directory / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    counts = {
        "steps": len({line["step"] for line in found.metrics}),
        "evaluations": len(found.evaluations),
        "gradient probes": len(found.gradient_probes),
        "responses": len(found.records),
    }
    print("read   " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    if messages:
        print(f"\n{len(messages)} could not be read and are left out:", file=sys.stderr)
        for message in messages[:_MESSAGES]:
            print(f"  {message}", file=sys.stderr)
        if len(messages) > _MESSAGES:
            print(f"  and {len(messages) - _MESSAGES} more, in the report", file=sys.stderr)
    print(f"open   {output}")
    return 0
