"""The grammar of the figures: panels of lines over steps, of bars, and of coloured cells.

A figure is a row or grid of panels; what a panel shows is plain numbers with names. NaN is a gap, a
panel without a value says "not recorded". Nothing here touches pyplot or matplotlib's settings.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenweights._errors import invalid
from tokenweights.report.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, float]]

_DOTTED = 25


@dataclass(frozen=True)
class Line:
    """A named line over steps.

    Attributes:
        name: Written at the line's end; empty for an only line.
        color: Its colour.
        steps: Ascending.
        values: One per step; NaN is a gap.
        spread: Half the height of a band around the line, one per step; empty for none.
        faint: Drawn thin and without a name, behind others.
    """

    name: str
    color: str
    steps: Sequence[float]
    values: Sequence[float]
    spread: Sequence[float] = ()
    faint: bool = False


def figure_of(*, width: float = 8.0, height: float = 3.1) -> "Figure":
    """An empty figure of the shared layout, in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.04, hspace=0.06)
    return Figure(figsize=(width, height), dpi=100, layout=layout)


def say_what_of(figure: "Figure", text: str) -> None:
    """One line over all panels that says what the numbers are of."""
    options = {"x": 0.01, "ha": "left", "fontsize": 8.5, "color": style.MUTED}
    figure.suptitle(text, parse_math=False, **options)


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred means over `window` values, an odd number; of what there is at the ends and gaps."""
    half = window // 2
    means = []
    for position, value in enumerate(values):
        near = [v for v in values[max(0, position - half) : position + half + 1] if v == v]
        means.append(math.fsum(near) / len(near) if value == value else math.nan)
    return means


def series(metrics: Metrics, key: str) -> tuple[list[float], list[float]]:
    """Ascending steps that logged `key`, and the last value of each; NaN where not finite."""
    for line in metrics:
        if "step" not in line:
            condition, hint = "with the key `step` in every line", "Add the training step."
            raise invalid("figures", "metrics", condition, f"keys {sorted(line)}", hint)
    values = {line["step"]: line[key] for line in metrics if key in line}
    steps = sorted(values)
    return steps, [values[step] if math.isfinite(values[step]) else math.nan for step in steps]


def first_recorded(metrics: Metrics, keys: Sequence[str]) -> str:
    """The first of several names of one quantity that any step logged; the first if none did."""
    logged = {name for line in metrics for name in line}
    return next((key for key in keys if key in logged), keys[0])


def line_of(metrics: Metrics, key: str, name: str, color: str, *, spread: str = "") -> Line:
    """The line of a metric, with the band of another metric around it if there is one."""
    steps, values = series(metrics, key)
    bands = dict(zip(*series(metrics, spread), strict=True)) if spread else {}
    width = [bands.get(step, math.nan) for step in steps] if bands else []
    return Line(name, color, steps, values, width)


def draw_lines(axes: "Axes", lines: Sequence[Line], *, from_zero: bool = False) -> None:
    """Draws lines named at their ends, or says "not recorded"."""
    from matplotlib.ticker import MaxNLocator

    labels = []
    for line in lines:
        pairs = list(zip(line.steps, line.values, strict=True))
        ends = [(x, y) for x, y in pairs if y == y][-1:]
        if line.spread:
            low = [y - s for (_, y), s in zip(pairs, line.spread, strict=True)]
            high = [y + s for (_, y), s in zip(pairs, line.spread, strict=True)]
            options = {"color": line.color, "alpha": 0.13, "linewidth": 0}
            axes.fill_between(line.steps, low, high, **options)
        if not ends:
            continue
        if line.faint:
            options = {"color": line.color, "linewidth": 0.8, "alpha": 0.4}
            axes.plot(line.steps, line.values, **options)
            continue
        # A line shows no single point, so a short series gets a dot per value.
        marker = "o" if len(pairs) <= _DOTTED else ""
        options = {"color": line.color, "marker": marker, "markersize": 4, "clip_on": False}
        axes.plot(line.steps, line.values, **options)
        labels += [(*end, line.name, line.color) for end in ends]
    if not labels:
        say_nothing_recorded(axes)
        return
    if from_zero:
        axes.set_ylim(bottom=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel(axes.get_xlabel() or "step")
    style.label_lines(axes, labels)


def draw_bars(
    axes: "Axes",
    names: Sequence[str],
    values: Sequence[float],
    colors: Sequence[str],
    *,
    shown: Callable[[float], str],
    slots: int = 0,
) -> None:
    """Draws horizontal bars from the top down, named and with their values, in `slots` places."""
    if not names:
        say_nothing_recorded(axes)
        return
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    places = range(len(names))
    axes.barh(places, finite, color=list(colors), height=0.72)
    for place, value in zip(places, values, strict=True):
        text = shown(value) if math.isfinite(value) else "none"
        where = (value if math.isfinite(value) else 0.0, place)
        offset = {"xytext": (4, 0), "textcoords": "offset points"}
        axes.annotate(text, where, va="center", fontsize=8, color=style.MUTED, **offset)
    axes.set_yticks(places, names, color=style.INK, parse_math=False)
    axes.set_ylim(max(slots, len(names)) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.margins(x=0.22)


def draw_cells(
    axes: "Axes",
    values: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    limits: tuple[float, float] | None = None,
    diverging: bool = False,
    unit: str = "",
    written: bool = False,
) -> None:
    """Draws a table of numbers as coloured cells, the first row at the bottom, with a colour bar.

    Args:
        axes: Where to draw.
        values: One sequence per row.
        rows: Name of each row.
        columns: Name of each column; at most twelve are written.
        limits: Ends of the colour scale; the extrema if None.
        diverging: Two hues that meet at zero, with symmetric limits.
        unit: Text at the colour bar.
        written: Write each number into its cell.
    """
    finite = [value for row in values for value in row if math.isfinite(value)]
    if not finite:
        say_nothing_recorded(axes)
        return
    low, high = limits or (min(finite), max(finite))
    if diverging:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    colors = style.colormap(diverging=diverging)
    picture = axes.pcolormesh([list(row) for row in values], cmap=colors, vmin=low, vmax=high)
    axes.set_facecolor(style.GRID)
    axes.grid(visible=False)
    axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
    every = math.ceil(len(columns) / 12)
    places = range(0, len(columns), every)
    axes.set_xticks([place + 0.5 for place in places], [columns[place] for place in places])
    bar = axes.figure.colorbar(picture, ax=axes, pad=0.02, aspect=26)
    bar.outline.set_visible(False)
    bar.set_label(unit)
    if written:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                text = f"{value:.2f}" if math.isfinite(value) else ""
                dark = high > low and (value - low) / (high - low) > 0.6 and not diverging
                color = "#ffffff" if dark else style.INK
                place = {"ha": "center", "va": "center", "fontsize": 8}
                axes.text(column + 0.5, row + 0.5, text, color=color, **place)


def say_nothing_recorded(axes: "Axes") -> None:
    """Leaves a panel empty, with words that say so."""
    place = {"transform": axes.transAxes, "ha": "center", "va": "center"}
    axes.text(0.5, 0.5, "not recorded", color=style.MUTED, **place)
    axes.set_axis_off()


def percent(value: float, _: int = 0) -> str:
    """A share as whole percent, for an axis."""
    return f"{value:.0%}"
