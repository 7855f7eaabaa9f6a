"""The report of one run: a single HTML page with its accuracy, its figures and two token traces.

A run directory holds up to four files, each optional but the metrics:

| file | content |
|---|---|
| `run.json` | `title`, `description`, `recipe` and `settings`, see `Run` |
| `metrics.jsonl` | one line per training step, `append_metrics` |
| `evaluations.jsonl` | one line per evaluation with keys `accuracy/<name>`, `append_metrics` |
| `tokens.jsonl` | token records, `append_token_records` |
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.report import trace
from tokenweights.report.document import document_html, escaped, facts_html, filled
from tokenweights.report.figures import dynamics_figure, learning_figure, weights_figure
from tokenweights.report.figures.style import figure_svg
from tokenweights.report.figures.training import accuracy_keys
from tokenweights.report.records import (
    FilePath,
    TokenRecord,
    read_metrics,
    read_token_records,
)


@dataclass(frozen=True)
class Run:
    """What a run left behind, as its report shows it.

    Attributes:
        title: Title of the report.
        description: What was trained and how, as plain text; an empty line starts a paragraph.
        recipe: The recipe in words, such as `Recipe.describe` gives; its line breaks are kept.
        settings: Names and values, shown as they are.
        metrics: One flat dictionary per training step, with the key `step`.
        evaluations: One flat dictionary per evaluation, with `step` and keys `accuracy/<name>`.
        records: Responses; the report shows one of the first step and one of the last.

    Example:
        >>> run = Run(title="low2high", metrics=[{"step": 0, "reward": -1.0}])
        >>> run.records
        ()
    """

    title: str = "Training run"
    description: str = ""
    recipe: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, float]] = ()
    evaluations: Sequence[Mapping[str, float]] = ()
    records: Sequence[TokenRecord] = ()


@typed
def run_from_directory(directory: FilePath) -> Run:
    """The run that a directory holds, with one response of its first step and one of its last.

    The two responses answer the same prompt if both steps have one in common: the first such
    prompt, and for each step the first response to it.

    Args:
        directory: A run directory as this module describes it.

    Returns:
        The run. A missing file other than `metrics.jsonl` leaves its part empty.

    Raises:
        TokenWeightsError: `metrics.jsonl` is missing, or a file does not hold what it should.

    Example:
        >>> import tempfile
        >>> from tokenweights.report import append_metrics
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     append_metrics(f"{folder}/metrics.jsonl", {"step": 0, "reward": -1.0})
        ...     run_from_directory(folder).metrics
        [{'step': 0, 'reward': -1.0}]
    """
    folder = Path(directory)
    if not (folder / "metrics.jsonl").is_file():
        got, hint = os.fspath(directory), "Append metrics while the run trains."
        raise invalid("run_from_directory", "directory", "to hold metrics.jsonl", got, hint)
    evaluations, tokens = folder / "evaluations.jsonl", folder / "tokens.jsonl"
    return Run(
        **_described(folder / "run.json"),
        metrics=read_metrics(folder / "metrics.jsonl"),
        evaluations=read_metrics(evaluations) if evaluations.is_file() else (),
        records=trace.first_and_last(read_token_records(tokens)) if tokens.is_file() else (),
    )


@typed
def run_report_html(run: Run | FilePath) -> str:
    """The report of a run as one self-contained HTML page.

    Args:
        run: A run, or a directory for `run_from_directory`.

    Returns:
        HTML in one string, to be written as UTF-8. It holds the description, the held-out accuracy
        before and after, the figures as SVG that follows a light or dark page, and the traces.

    Example:
        >>> page = run_report_html(Run(title="low2high", metrics=[{"step": 0, "reward": -1.0}]))
        >>> "No evaluation was recorded." in page
        True
    """
    if not isinstance(run, Run):
        run = run_from_directory(run)
    paragraphs = run.description.split("\n\n")
    records = trace.first_and_last(run.records)
    figures = {
        "learning": learning_figure(run.metrics, run.evaluations),
        "dynamics": dynamics_figure(run.metrics),
        "weights": weights_figure(run.metrics),
    }
    body = filled(
        "page.html",
        title=escaped(run.title),
        description="\n".join(f"<p>{escaped(part)}</p>" for part in paragraphs if part.strip()),
        recipe=f'<pre class="recipe">{escaped(run.recipe)}</pre>' if run.recipe else "",
        settings=facts_html(run.settings),
        accuracy=_accuracy_html(run.evaluations),
        traces=trace.traces_html(records) if records else _absent("No response"),
        **{name: figure_svg(figure, name=name) for name, figure in figures.items()},
    )
    styles = ("page.css", *trace.STYLES)
    return document_html(title=run.title, body=body, styles=styles, scripts=trace.SCRIPTS)


def _described(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    kinds = {"title": str, "description": str, "recipe": str, "settings": dict}
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        got, hint = f"{path}: {error}", "Write one JSON object."
        raise invalid("run_from_directory", "run.json", "to be JSON", got, hint) from error
    valid = isinstance(described, dict) and all(
        name in kinds and isinstance(value, kinds[name]) for name, value in described.items()
    )
    if not valid:
        condition = "to hold the texts `title`, `description`, `recipe` and the object `settings`"
        raise invalid("run_from_directory", "run.json", condition, path, "Leave other keys out.")
    return described


def _accuracy_html(evaluations: Sequence[Mapping[str, float]]) -> str:
    rows = []
    for key, name in accuracy_keys(evaluations).items():
        lines = sorted((e for e in evaluations if math.isfinite(e.get(key, math.nan))), key=_step)
        if not lines:
            continue
        first, last = lines[0], lines[-1]
        change = 100 * (last[key] - first[key])
        rows.append(
            f'<tr><th scope="row">{escaped(name)}</th>'
            f"<td>{_point(first, key)}</td><td>{_point(last, key)}</td>"
            f"<td>{change:+.1f} points</td></tr>".replace("+-", "\u2212").replace(">-", ">\u2212")
        )
    if not rows:
        return _absent("No evaluation")
    heads = "".join(
        f'<th scope="col">{head}</th>' for head in ("Held out", "Before", "After", "Change")
    )
    return (
        f'<table class="accuracy"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _step(line: Mapping[str, float]) -> float:
    return line["step"]


def _point(line: Mapping[str, float], key: str) -> str:
    return f'{line[key]:.1%} <small class="quiet">step {line["step"]:g}</small>'


def _absent(what: str) -> str:
    return f'<p class="quiet">{what} was recorded.</p>'
