"""Figures of what a gradient probe logged."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tokenweights._typing import typed
from tokenweights.report import style

if TYPE_CHECKING:
    import matplotlib.figure

BANDS = (
    ("high", style.EXPLORER, "D7-D9"),
    ("middle", style.ALL, "D3-D6"),
    ("low", style.ANCHOR, "D0-D2"),
)


@typed
def decile_heatmap(metrics: Sequence[Mapping[str, float]]) -> "matplotlib.figure.Figure":
    """Projection ratio of every entropy decile at every probe, and the shares of three bands (J.1).

    A column is a probe, a row a decile, the lowest entropy at the bottom. The color scale is
    symmetric, so that white is 0: orange deciles push along the full gradient, blue ones against
    it. A uniform spectrum has 0.1 everywhere. A decile that was not logged stays grey.

    Args:
        metrics: Lines of a probe's series, as `read_metrics` returns them: `step`,
            `gradient/decile_0` to `decile_9`, `gradient/low_share`, `middle_share`, `high_share`.
            Of a step that was logged twice the last line counts; lines without deciles are left
            out.

    Returns:
        A figure with two panels and a color bar.

    Example:
        >>> line = {f"gradient/decile_{number}": 0.1 for number in range(10)}
        >>> figure = decile_heatmap([{"step": 1, **line}])
        >>> [axes.get_title(loc="left") for axes in figure.axes[:2]]
        ['Projection ratio by entropy decile', 'Share by entropy band']
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    keys = [f"gradient/decile_{number}" for number in range(10)]
    lines = {line["step"]: line for line in metrics if any(key in line for key in keys)}
    steps = sorted(lines)
    cells = [[lines[step].get(key, math.nan) for step in steps] for key in keys]
    largest = max((abs(v) for row in cells for v in row if math.isfinite(v)), default=0.0) or 1.0
    colors = LinearSegmentedColormap.from_list("alignment", [style.ANCHOR, "white", style.EXPLORER])
    colors = colors.with_extremes(bad=style.GRID)
    with style.figure_style():
        figure = Figure(figsize=(8.0, 3.1), dpi=150, layout="constrained")
        heat, shares = figure.subplots(1, 2, width_ratios=(3, 2))
        heat.set_title("Projection ratio by entropy decile")
        shares.set_title("Share by entropy band")
        if not steps:
            for axes in (heat, shares):
                place = {"transform": axes.transAxes, "ha": "center", "va": "center"}
                axes.text(0.5, 0.5, "not recorded", color=style.MUTED, **place)
                axes.set_axis_off()
            return figure
        heat.grid(visible=False)
        drawn = heat.imshow(
            cells, cmap=colors, vmin=-largest, vmax=largest, origin="lower", aspect="auto"
        )
        figure.colorbar(drawn, ax=heat, pad=0.02).outline.set_visible(False)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        shown = range(0, len(steps), math.ceil(len(steps) / 8))
        heat.set_xticks(list(shown), [f"{steps[column]:g}" for column in shown])
        heat.set_yticks(range(10), [f"D{number}" for number in range(10)])
        heat.set_xlabel("step")
        labels = []
        for band, color, deciles in BANDS:
            values = [lines[step].get(f"gradient/{band}_share", math.nan) for step in steps]
            shares.plot(steps, values, color=color, marker="." if len(steps) <= 25 else "")
            if math.isfinite(values[-1]):
                labels.append((steps[-1], values[-1], f"{band}, {deciles}", color))
        shares.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        shares.set_xlabel("step")
        figure.draw_without_rendering()
        style.label_lines(shares, labels)
    return figure
