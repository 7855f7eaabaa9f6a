"""A comparison of recipes as tables and as one HTML page."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenweights._typing import typed
from tokenweights.report.comparison import Comparison, Effect, RecipeResult
from tokenweights.report.document import document_html, escaped, facts_html, filled
from tokenweights.report.figures import style
from tokenweights.report.figures.panels import Line, draw_lines, figure_of
from tokenweights.rewards import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Hues that a color blindness brings together differ in their stroke, and so do repeated colors.
_COLORS = (style.ANCHOR, style.EXPLORER, style.ACCENT, style.SECOND, style.INK)
_STROKES, _STROKE_OF = ("-", "--", ":", "-."), (0, 0, 1, 2, 3)
_LABEL = 22


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: What it shows.
        note: How to read it.
        heads: Name of each column.
        rows: Cells; the first names the row.
    """

    title: str
    note: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Values of every recipe, and effects against the baseline where there are any."""
    metric = comparison.metric
    heads = ("recipe", "seeds", "final", "mean", "mean weight", "effective sample size")
    rows = tuple(
        (
            result.recipe,
            str(len(result.seeds)),
            _estimate(result.final),
            _estimate(result.mean),
            _number(result.weight_mean),
            _number(result.effective_sample_size),
        )
        for result in comparison.results
    )
    note = (
        "Final is the last common step, mean is over all of them; in brackets the 95 % bootstrap "
        "interval over seeds."
    )
    tables = [Table(metric, note, heads, rows)]
    effects = tuple(
        (
            result.recipe,
            _estimate(effect.final, signed=True),
            _estimate(effect.mean, signed=True),
            _how(result, effect, comparison),
        )
        for result in comparison.results
        if (effect := result.effect) is not None
    )
    if effects:
        title = f"{metric}, difference to {comparison.baseline}"
        note = "Paired: the mean of the differences seed by seed. Unpaired: no seed is shared."
        tables.append(Table(title, note, ("recipe", "final", "mean", "compared"), effects))
    return tables


@typed
def comparison_figure(comparison: Comparison) -> "Figure":
    """The metric of every recipe over the common steps, the mean over seeds.

    A band is one standard deviation of the seeds to either side; a recipe with one seed has none.

    Args:
        comparison: What `recipe_comparison` returns.

    Returns:
        A figure with one panel.

    Example:
        >>> from tokenweights.report import RecipeRun, recipe_comparison
        >>> runs = [RecipeRun("full", seed, [{"step": 0, "reward": seed}]) for seed in (0, 1)]
        >>> figure = comparison_figure(recipe_comparison(runs))
        >>> figure.axes[0].get_ylabel()
        'reward'
    """
    baseline, lines, strokes, others = comparison.baseline, [], [], 0
    for result in comparison.results:
        color, stroke = style.ALL, "-"
        if result.recipe != baseline:
            around, place = divmod(others, len(_COLORS))
            color = _COLORS[place]
            stroke = _STROKES[(_STROKE_OF[place] + around) % len(_STROKES)]
            others += 1
        name = _short(result.recipe)
        lines.append(Line(name, color, comparison.steps, result.curve, result.spread))
        strokes.append(stroke)
    with style.figure_style():
        figure = figure_of(height=3.6)
        axes = figure.subplots()
        axes.set_ylabel(_short(comparison.metric, 40), parse_math=False)
        draw_lines(axes, lines)
        for drawn, stroke in zip(axes.lines, strokes, strict=True):
            drawn.set_linestyle(stroke)
    return figure


@typed
def comparison_html(comparison: Comparison) -> str:
    """A comparison as one self-contained HTML page, with its tables, its figure and its notes.

    Args:
        comparison: What `recipe_comparison` returns.

    Returns:
        HTML in one string, to be written as UTF-8.

    Example:
        >>> from tokenweights.report import RecipeRun, recipe_comparison
        >>> runs = [RecipeRun("full", seed, [{"step": 0, "reward": seed}]) for seed in (0, 1)]
        >>> "<h1>Recipes compared by reward</h1>" in comparison_html(recipe_comparison(runs))
        True
    """
    first, last = comparison.steps[0], comparison.steps[-1]
    count = len(comparison.steps)
    title = f"Recipes compared by {comparison.metric}"
    facts = {
        "runs": sum(len(result.seeds) for result in comparison.results),
        "recipes": len(comparison.results),
        "steps": f"{count}, from {first:g} to {last:g}" if count > 1 else f"1, {first:g}",
        "baseline": comparison.baseline,
    }
    notes = "".join(f"<li>{escaped(note)}</li>" for note in comparison.notes)
    seeds = any(result.spread for result in comparison.results)
    band = " A band is one standard deviation of the seeds to either side." if seeds else ""
    body = filled(
        "comparison.html",
        title=escaped(title),
        facts=facts_html(facts),
        notes=f'<ul class="notes">{notes}</ul>' if notes else "",
        tables="\n".join(map(_table_html, comparison_tables(comparison))),
        figure=filled(
            "section.html",
            title="Over training",
            note=f"The mean over seeds at each step.{band}",
            label=escaped(f"{comparison.metric} of each recipe over training steps"),
            figure=style.figure_svg(comparison_figure(comparison), name="comparison"),
        ),
    )
    return document_html(title=title, body=body, styles=("page.css", "comparison.css"), scripts=())


def _table_html(table: Table) -> str:
    heads = "".join(f'<th scope="col">{escaped(head)}</th>' for head in table.heads)
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th>'
        + "".join(f"<td>{_minus(escaped(cell))}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in table.rows
    )
    title, note = escaped(table.title), escaped(table.note)
    return filled("comparison_table.html", title=title, note=note, heads=heads, rows=rows)


def _minus(cell: str) -> str:
    """Hyphens before digits as minus signs."""
    return cell.replace("-", "\u2212") if cell != "-" else "\u2013"


def _how(result: RecipeResult, effect: Effect, comparison: Comparison) -> str:
    count = len(effect.seeds)
    if count:
        return f"paired, {count} seeds" if count > 1 else "paired, 1 seed: no interval"
    base = len(comparison.results[0].seeds)
    words = f"unpaired, {len(result.seeds)} and {base} seeds"
    return f"{words}: no interval" if min(len(result.seeds), base) == 1 else words


def _estimate(interval: Interval, *, signed: bool = False) -> str:
    shown = _number(interval.mean, signed=signed)
    if math.isnan(interval.low):
        return shown
    low, high = (_number(bound, signed=signed) for bound in (interval.low, interval.high))
    return f"{shown} [{low}, {high}]"


def _number(value: float, *, signed: bool = False) -> str:
    if math.isnan(value):
        return "-"
    plain = value == 0 or 1e-3 <= abs(value) < 1e5
    return format(value, f"{'+' if signed and value else ''}{'.3f' if plain else '.3g'}")


def _short(text: str, length: int = _LABEL) -> str:
    """A name for a figure: visible, in characters of its font, and no longer than fits."""
    shown = style.drawable(text).replace("\u00b7", " ")
    return shown if len(shown) <= length else f"{shown[: length - 1]}\u2026"
