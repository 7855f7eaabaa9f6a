"""Gradient geometry over training, drawn from the metrics of a gradient probe."""

from typing import TYPE_CHECKING

from tokenweights._typing import typed
from tokenweights.report.figures import style
from tokenweights.report.figures.panels import (
    Metrics,
    draw_cells,
    draw_lines,
    figure_of,
    line_of,
    percent,
    series,
)

if TYPE_CHECKING:
    import matplotlib.figure

_SUBSETS = (
    ("random 20 %", style.ALL, "random"),
    ("explorers", style.EXPLORER, "explorer"),
    ("anchors", style.ANCHOR, "anchor"),
)
_GEOMETRY = (
    ("Cosine to the full gradient", "cosine"),
    ("Norm, share of the full one", "norm_ratio"),
    ("Projection ratio", "projection_ratio"),
)
_DISPERSION = (
    ("Cosine, std so far", "cosine_std"),
    ("Cosine, std / mean so far", "cosine_cv"),
)
_BANDS = (
    ("high: deciles 7-9", style.EXPLORER, "high_share"),
    ("middle: deciles 3-6", style.ALL, "middle_share"),
    ("low: deciles 0-2", style.ANCHOR, "low_share"),
)
_DECILES = 10


@typed
def gradient_figure(metrics: Metrics) -> "matplotlib.figure.Figure":
    """Gradients of subsets against the full gradient over training (Figure 4).

    Args:
        metrics: Reads `cosine`, `norm_ratio` and `projection_ratio` after `gradient/anchor_`,
            `gradient/explorer_` and `gradient/random_`.

    Returns:
        A figure with three panels.

    Example:
        >>> figure = gradient_figure([{"step": 1, "gradient/anchor_cosine": 0.7}])
        >>> figure.axes[0].texts[0].get_text()
        'anchors'
    """
    return _subset_figure(metrics, _GEOMETRY)


@typed
def dispersion_figure(metrics: Metrics) -> "matplotlib.figure.Figure":
    """How much the cosine of each subset has varied up to each probe (Figure 24).

    Args:
        metrics: Reads `cosine_std` and `cosine_cv` after `gradient/anchor_`, `gradient/explorer_`
            and `gradient/random_`.

    Returns:
        A figure with two panels.

    Example:
        >>> len(dispersion_figure([{"step": 1, "gradient/anchor_cosine_std": 0.1}]).axes)
        2
    """
    return _subset_figure(metrics, _DISPERSION)


@typed
def decile_heatmap(metrics: Metrics) -> "matplotlib.figure.Figure":
    """Projection ratio of each entropy decile over training, and shares of bands (Figure 25).

    Args:
        metrics: Reads `gradient/decile_0` ... `decile_9`, which sum to one at each step, and
            `low_share`, `middle_share` and `high_share` after `gradient/`.

    Returns:
        A figure with a heat map, decile 0 (lowest entropy) at the bottom, and a panel of lines.

    Example:
        >>> ratios = {f"gradient/decile_{number}": 0.1 for number in range(10)}
        >>> figure = decile_heatmap([{"step": 1, **ratios}])
        >>> figure.axes[0].get_title(loc="left")
        'Projection ratio of entropy deciles'
    """
    with style.figure_style():
        figure = figure_of(width=9.0, height=3.4)
        cells, bands = figure.subplots(1, 2, width_ratios=(3, 2))
        cells.set_title("Projection ratio of entropy deciles")
        rows = [dict(zip(*series(metrics, _decile(n)), strict=True)) for n in range(_DECILES)]
        steps = sorted(set().union(*rows))
        table = [[row.get(step, float("nan")) for step in steps] for row in rows]
        draw_cells(
            cells,
            table,
            rows=[f"D{number}" for number in range(_DECILES)],
            columns=[f"{step:g}" for step in steps],
            diverging=True,
        )
        if steps:
            cells.set_xlabel("step of the probe")
        bands.set_title("Share of the projection by band")
        bands.yaxis.set_major_formatter(percent)
        draw_lines(bands, [line_of(metrics, f"gradient/{key}", n, c) for n, c, key in _BANDS])
    return figure


def _decile(number: int) -> str:
    return f"gradient/decile_{number}"


def _subset_figure(
    metrics: Metrics, panels: tuple[tuple[str, str], ...]
) -> "matplotlib.figure.Figure":
    with style.figure_style():
        figure = figure_of(width=9.0)
        for axes, (title, key) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            axes.set_title(title)
            lines = [line_of(metrics, f"gradient/{s}_{key}", n, c) for n, c, s in _SUBSETS]
            draw_lines(axes, lines)
    return figure
