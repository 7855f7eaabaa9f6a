"""Turn the directory of a run into one HTML report."""

import argparse
import sys
from functools import partial
from pathlib import Path

from tokenweights._errors import invalid
from tokenweights.commands.extras import imported
from tokenweights.commands.outputs import require_output
from tokenweights.commands.terminal import shown
from tokenweights.report import Run, run_from_directory, run_report_html
from tokenweights.report.runs import FILES

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
    output = options.output or options.directory / "report.html"
    if options.directory.is_dir():  # what is none is refused as what it is
        require_output("report", output)
    messages: list[str] = []
    found = run_from_directory(
        options.directory,
        unreadable=messages.append,
        progress=partial(bar, desc="reading token records", unit=" responses"),
    )
    _require_something(found, options.directory)
    page = run_report_html(found, progress=partial(bar, desc="drawing", unit=" figures"))
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
    print(shown(f"open   {output}"))
    return 0


def _require_something(found: Run, directory: Path) -> None:
    """A page of nothing would look like the report of a run."""
    if found.metrics or found.evaluations or found.gradients or found.records:
        return
    hint = "Append metrics while the run trains."
    if found.unreadable:
        first, count = found.unreadable[0], len(found.unreadable)
        hint = first if count == 1 else f"{count} could not be read, the first: {first}"
    *most, last = FILES
    condition = f"with a readable line in {', '.join(most)} or {last}"
    raise invalid("report", "RUN_DIR", condition, f"none in {directory}", hint)
