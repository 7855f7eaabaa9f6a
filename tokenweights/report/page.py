"""The report of one run: a single HTML page with its accuracy, its figures and two token traces."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenweights._typing import typed
from tokenweights.diagnostics import CollapseMonitor
from tokenweights.report import figures, trace
from tokenweights.report.document import document_html, escaped, facts_html, filled
from tokenweights.report.figures.columns import counted, layers_of, unit_of
from tokenweights.report.figures.panels import first_recorded, series
from tokenweights.report.figures.style import figure_svg
from tokenweights.report.figures.training import LENGTH, REWARD, accuracy_keys
from tokenweights.report.lines import FilePath
from tokenweights.report.records import TokenRecord
from tokenweights.report.runs import Progress, Run, run_from_directory

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class _Section:
    name: str
    title: str
    note: str
    label: str
    figure: "Callable[[], Figure]"


@typed
def run_report_html(run: Run | FilePath, *, progress: Progress | None = None) -> str:
    """The report of a run as one self-contained HTML page.

    Args:
        run: A run, or a directory for `run_from_directory`.
        progress: Wraps the sections while their figures are drawn, as `tqdm` does.

    Returns:
        HTML in one string, to be written as UTF-8. It holds the description, the held-out accuracy
        before and after, the verdict of a `CollapseMonitor`, the figures as SVG that follows a
        light or dark page, the traces, and what could not be read.

    Example:
        >>> page = run_report_html(Run(title="low2high", metrics=[{"step": 0, "reward": -1.0}]))
        >>> "No evaluation was recorded." in page
        True
    """
    if not isinstance(run, Run):
        run = run_from_directory(run)
    paragraphs = run.description.split("\n\n")
    records = trace.first_and_last(run.records)
    sections = _sections(run)
    body = filled(
        "page.html",
        title=escaped(run.title),
        description="\n".join(f"<p>{escaped(part)}</p>" for part in paragraphs if part.strip()),
        recipe=f'<pre class="recipe">{escaped(run.recipe)}</pre>' if run.recipe else "",
        settings=facts_html(run.settings),
        unreadable=_unreadable_html(run.unreadable),
        accuracy=_accuracy_html(_evaluations(run)),
        health=_health_html(run),
        sections="\n".join(
            filled(
                "section.html",
                title=section.title,
                note=section.note,
                label=section.label,
                figure=figure_svg(section.figure(), name=section.name),
            )
            for section in (sections if progress is None else progress(sections))
        ),
        traces=trace.traces_html(records) if records else _absent("No response"),
    )
    styles = ("page.css", *trace.STYLES)
    return document_html(title=run.title, body=body, styles=styles, scripts=trace.SCRIPTS)


def _sections(run: Run) -> list[_Section]:
    """Learning, entropy and weights of any run; gradients and tokens where they were recorded."""
    entropy = "Attention entropy"
    if run.records:
        record = run.records[-1]
        entropy += f" ({unit_of(record.entropy_kind)}), {layers_of([record])}"
    sections = [
        _Section(
            "learning",
            "Learning",
            "What the policy earned while training, and what it solved outside of it.",
            "Training reward and held-out accuracy over training steps",
            lambda: figures.learning_figure(run.metrics, _evaluations(run)),
        ),
        _Section(
            "dynamics",
            "Attention entropy",
            "Anchors have the lowest attention entropy within their response, explorers the "
            "highest. A band is one standard deviation of the tokens\u2019 entropies to either "
            "side.",
            "Attention entropy of anchors, explorers and all tokens, and response length, over "
            "training steps",
            lambda: figures.dynamics_figure(run.metrics, title=entropy),
        ),
        _Section(
            "weights",
            "Token weights",
            "The schedule sets the weight at both ends of the entropy range; the other panels "
            "show what it did to the batch.",
            "Weights at the ends of the entropy range, mean weight, effective sample size and "
            "shares of total weight, over training steps",
            lambda: figures.weights_figure(run.metrics),
        ),
    ]
    if run.entropies:
        sections.append(
            _Section(
                "kinds",
                "Attention entropy of other kinds",
                f"Of the recorded responses, {layers_of(run.records[-1:])}: the largest weights "
                "alone leave the long tail out, the first keys alone the growth of the context. "
                f"Anchors and explorers are those of each kind itself.{_kinds_alike(run)}",
                "Other kinds of attention entropy of anchors, explorers and all tokens, over "
                "training steps",
                lambda: figures.kinds_figure(run.entropies),
            )
        )
    if run.gradient_probes:
        sections += _gradient_sections(run.gradients or run.metrics)
    last = [record for record in run.records if record.step == run.records[-1].step]
    return [*sections, *(_token_sections(last) if last else [])]


def _kinds_alike(run: Run) -> str:
    """A sentence where short contexts make several kinds the same number."""
    courses = [[line["entropy_mean"] for line in lines] for lines in run.entropies.values()]
    apart = any(abs(a - b) > 1e-4 for c in courses for a, b in zip(courses[0], c, strict=False))
    if apart or len(courses) < 2:
        return ""
    return " Here they are one: no context has more keys than the kinds keep."


def _token_sections(last: Sequence[TokenRecord]) -> list[_Section]:
    """What the recorded responses of the last step show."""
    where = f"Step {last[0].step}: {counted(last)}, of {len(last)} recorded."
    sections = []
    if all(record.predictive_entropy is not None for record in last):
        sections += [
            _Section(
                "relation",
                "Two entropies",
                f"{where} A point is a token: predictive entropy is the policy\u2019s doubt about "
                "the token, attention entropy says how widely it looked.",
                "Predictive against attention entropy of tokens",
                lambda: figures.entropy_relation_figure(last),
            ),
            _Section(
                "quadrants",
                "Tokens by quadrant",
                f"{where} Both entropies are cut at the medians of each response. A bar counts "
                "occurrences.",
                "Most frequent tokens of each quadrant of the two entropies",
                lambda: figures.quadrant_figure(last),
            ),
        ]
    if all((record.columns or {}).keys() & {"mean_distance"} for record in last):
        sections.append(
            _Section(
                "support",
                "Where attention lies",
                f"{where} How many keys hold a share of a token\u2019s attention, and how far away "
                "they are.",
                "Support size, mean distance and local mass of token groups",
                lambda: figures.support_figure(last, kind=last[0].entropy_kind),
            )
        )
    if last[0].attended is not None:
        sections.append(
            _Section(
                "attended",
                "What single tokens looked at",
                f"Step {last[0].step}, the first recorded response: the tokens of lowest and of "
                "highest attention entropy in its second half.",
                "Attention weights of two tokens over their context",
                lambda: figures.attention_map_figure(last[0]),
            )
        )
    return sections


def _gradient_sections(gradients: Sequence[Mapping[str, float]]) -> list[_Section]:
    return [
        _Section(
            "gradient",
            "Gradient geometry",
            "Gradients of a fifth of the probe batch against its full gradient.",
            "Cosine, norm ratio and projection ratio of anchors, explorers and random tokens",
            lambda: figures.gradient_figure(gradients),
        ),
        _Section(
            "dispersion",
            "Stability of directions",
            "How much the cosine of each subset has varied up to each probe.",
            "Standard deviation and coefficient of variation of the cosines over training",
            lambda: figures.dispersion_figure(gradients),
        ),
        _Section(
            "deciles",
            "Gradient by entropy decile",
            "Decile 0 has the lowest entropy. The ten ratios of a step sum to one.",
            "Projection ratio of entropy deciles over training, and shares of three bands",
            lambda: figures.decile_heatmap(gradients),
        ),
    ]


def _evaluations(run: Run) -> Sequence[Mapping[str, float]]:
    """The evaluations; validation that was logged among the metrics, as VeRL does, counts too."""
    if run.evaluations:
        return run.evaluations
    keys = accuracy_keys(run.metrics)
    return [line for line in run.metrics if keys.keys() & line.keys()]


def _health_html(run: Run) -> str:
    """The verdict of a `CollapseMonitor` on the steps that logged length and reward."""
    table = [
        dict(zip(*series(run.metrics, first_recorded(run.metrics, keys)), strict=True))
        for keys in (LENGTH, REWARD)
    ]
    monitor, verdict = CollapseMonitor(), None
    judged = sorted(table[0].keys() & table[1].keys())
    for step in judged:
        length, reward = (values[step] for values in table)
        if math.isfinite(length) and math.isfinite(reward):
            verdict = monitor.update(int(step), length=length, reward=reward)
            if verdict.collapsed:
                break
    if verdict is None:
        return ""
    if not verdict.collapsed:
        return f'<p class="health">{_healthy_words(verdict.step, monitor, len(judged))}</p>'
    mode = (verdict.mode or "").replace("_", " ")
    words = escaped(f"{mode}, raised at step {verdict.since}: {verdict.reason}.")
    return f'<p class="health collapsed"><strong>Collapse:</strong> {words}</p>'


def _healthy_words(step: int, monitor: CollapseMonitor, judged: int) -> str:
    """What no verdict is worth: one window is compared with another, levels with eight before."""
    window = monitor.thresholds.window
    if judged < 2 * window:
        return (
            f"Too early to judge whether the run is collapsing: {judged} steps were logged, and "
            f"{2 * window} are needed."
        )
    slow = f"; slow declines are judged from {9 * window} steps on" if judged < 9 * window else ""
    return (
        f"No collapse up to step {step}, judged by response length and reward at the documented "
        f"thresholds{slow}."
    )


def _unreadable_html(messages: Sequence[str]) -> str:
    if not messages:
        return ""
    shown = "".join(f"<li>{escaped(message)}</li>" for message in messages[:_MESSAGES])
    more = len(messages) - _MESSAGES
    rest = f"<li>and {more} more</li>" if more > 0 else ""
    return filled("unreadable.html", count=str(len(messages)), messages=shown + rest)


def _accuracy_html(evaluations: Sequence[Mapping[str, float]]) -> str:
    rows = []
    for key, name in accuracy_keys(evaluations).items():
        points = [
            point for point in zip(*series(evaluations, key), strict=True) if point[1] == point[1]
        ]
        if not points:
            continue
        first, last = points[0], points[-1]
        change = 100 * (last[1] - first[1])
        rows.append(
            f'<tr><th scope="row">{escaped(name)}</th>'
            f"<td>{_point(*first)}</td><td>{_point(*last)}</td>"
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


def _point(step: float, accuracy: float) -> str:
    return f'{accuracy:.1%} <small class="quiet">step {step:g}</small>'


def _absent(what: str) -> str:
    return f'<p class="quiet">{what} was recorded.</p>'


_MESSAGES = 20
