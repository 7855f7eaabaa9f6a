"""Several runs in one figure: the curves of Figures 2, 5 to 8, 12 to 14 and 26."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.report.figures import style
from tokenweights.report.figures.panels import Line, Metrics, draw_lines, figure_of, series

if TYPE_CHECKING:
    import matplotlib.figure

_COLORS = (style.ALL, style.ANCHOR, style.EXPLORER, style.ACCENT, style.SECOND, style.INK)


@typed
def runs_figure(
    runs: Mapping[str, Sequence[Metrics]],
    panels: Mapping[str, str],
    *,
    colors: Mapping[str, str] | None = None,
) -> "matplotlib.figure.Figure":
    """Metrics of several runs over training steps, a panel for each metric, a colour for each name.

    Runs of one name differ by their seed: each is a faint line, their mean at the steps that all of
    them have is the thick one (Figure 14). A name with one run is a thick line.

    Args:
        runs: For each name the metrics of its runs, as `read_metrics` returns them.
        panels: For each panel its title, unit included, and the metric it reads.
        colors: Colour of a name as `#rrggbb`; others are chosen.

    Returns:
        A figure with one panel per entry of `panels`, at most three in a row.

    Raises:
        TokenWeightsError: If there is no run or no panel.

    Example:
        >>> figure = runs_figure(
        ...     {
        ...         "anchors": [[{"step": 0, "reward": -1.0}, {"step": 1, "reward": 0.0}]],
        ...         "explorers": [[{"step": 0, "reward": -1.0}], [{"step": 0, "reward": -0.5}]],
        ...     },
        ...     {"Training reward": "reward"},
        ... )
        >>> len(figure.axes[0].lines)
        4
    """
    if not runs or not panels:
        got = f"{len(runs)} runs and {len(panels)} panels"
        raise invalid("runs_figure", "runs", "and panels to draw", got, "Pass at least one each.")
    wide = min(len(panels), 3)
    high = math.ceil(len(panels) / wide)
    palette = _COLORS * math.ceil(len(runs) / len(_COLORS))
    chosen = {**dict(zip(runs, palette, strict=False)), **(colors or {})}
    with style.figure_style():
        figure = figure_of(width=2.0 + 3.0 * wide, height=3.1 * high)
        grid = figure.subplots(high, wide, squeeze=False).flat
        for (title, key), axes in zip(panels.items(), grid, strict=False):
            axes.set_title(title)
            lines = []
            for name, seeds in runs.items():
                lines += _lines_of_seeds(seeds, key, name, chosen[name])
            draw_lines(axes, lines)
            if any(len(seeds) > 1 for seeds in runs.values()) and axes.lines:
                axes.set_xlabel("step (thick: mean over seeds)")
        for unused in grid:
            unused.set_axis_off()
    return figure


def _lines_of_seeds(seeds: Sequence[Metrics], key: str, name: str, color: str) -> list[Line]:
    drawn = [series(metrics, key) for metrics in seeds]
    drawn = [(steps, values) for steps, values in drawn if steps]
    if len(drawn) < 2:
        return [Line(name, color, *pair) for pair in drawn]
    faint = [Line("", color, steps, values, faint=True) for steps, values in drawn]
    tables = [dict(zip(steps, values, strict=True)) for steps, values in drawn]
    common = sorted(set.intersection(*(set(table) for table in tables)))
    means = [math.fsum(table[step] for table in tables) / len(tables) for step in common]
    return [*faint, Line(name, color, common, means)]
