"""Figures of one run, drawn from its metrics; each returns a matplotlib `Figure` of its own.

`metrics` and `evaluations` are flat dictionaries with the key `step`, as `read_metrics` returns
them. Lines are sorted by step; when a step was logged twice, after a resumed run for example, the
last value counts. NaN is drawn as a gap, and a panel without any value says "not recorded". No
function here touches pyplot or matplotlib's settings.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.report import style

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

Metrics = Sequence[Mapping[str, float]]

_SMOOTHING_SHARE = 0.05
_DOTTED = 25


@typed
def learning_figure(metrics: Metrics, evaluations: Metrics = ()) -> "matplotlib.figure.Figure":
    """Training reward and held-out accuracy over training steps.

    The reward is drawn twice: each step thin, and a centred mean over about a twentieth of the run
    thick. A step without a reward stays a gap.

    Args:
        metrics: Reads `reward`.
        evaluations: Reads every key `accuracy/<name>` as a share in $[0, 1]$ and draws it as
            line `<name>`.

    Returns:
        A figure with two panels.

    Example:
        >>> figure = learning_figure([{"step": 0, "reward": -1.0}], [])
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['Training reward', 'Held-out accuracy']
    """
    names = accuracy_names(evaluations)
    colors = (style.ACCENT, style.SECOND, style.INK, style.MUTED)
    with style.figure_style():
        figure = _figure(width=8.0, height=3.1)
        reward, accuracy = figure.subplots(1, 2)
        reward.set_title("Training reward")
        steps, values = _series(metrics, "reward")
        window = 2 * round(len(steps) * _SMOOTHING_SHARE / 2) + 1
        if window > 1 and steps:
            reward.plot(steps, values, color=style.ACCENT, linewidth=0.8, alpha=0.4)
            values = _moving_mean(values, window)
            reward.set_xlabel(f"step (thick: mean over {window} steps)")
        _draw(reward, [("", style.ACCENT, steps, values)])
        accuracy.set_title("Held-out accuracy")
        lines = [
            (name, color, *_series(evaluations, f"accuracy/{name}"))
            for name, color in zip(names, colors * len(names), strict=False)
        ]
        accuracy.yaxis.set_major_formatter(_percent)
        _draw(accuracy, lines, from_zero=True)
    return figure


@typed
def dynamics_figure(metrics: Metrics) -> "matplotlib.figure.Figure":
    """Attention entropy of anchors, explorers and all tokens over training, and response length.

    A line is the mean over the tokens of a group, its band one standard deviation of the tokens'
    entropies to either side: the spread within the group, not an error of the mean.

    Args:
        metrics: Reads `token_weights/entropy_mean` and `entropy_std`, the same with `anchor_` and
            `explorer_` before `entropy`, and `completions/mean_length`.

    Returns:
        A figure with two panels.

    Example:
        >>> figure = dynamics_figure([{"step": 0, "token_weights/entropy_mean": 0.6}])
        >>> figure.axes[1].texts[0].get_text()
        'not recorded'
    """
    groups = (
        ("explorers", style.EXPLORER, "token_weights/explorer_entropy"),
        ("all tokens", style.ALL, "token_weights/entropy"),
        ("anchors", style.ANCHOR, "token_weights/anchor_entropy"),
    )
    with style.figure_style():
        figure = _figure(width=8.0, height=3.1)
        entropy, length = figure.subplots(1, 2, width_ratios=(3, 2))
        entropy.set_title("Attention entropy, mean ± std of tokens")
        lines = []
        for label, color, key in groups:
            steps, mean = _series(metrics, f"{key}_mean")
            spread = dict(zip(*_series(metrics, f"{key}_std"), strict=True))
            low = [m - spread.get(step, math.nan) for step, m in zip(steps, mean, strict=True)]
            high = [m + spread.get(step, math.nan) for step, m in zip(steps, mean, strict=True)]
            entropy.fill_between(steps, low, high, color=color, alpha=0.13, linewidth=0)
            lines.append((label, color, steps, mean))
        _draw(entropy, lines)
        length.set_title("Mean response length, tokens")
        _draw(
            length,
            [("", style.ACCENT, *_series(metrics, "completions/mean_length"))],
            from_zero=True,
        )
    return figure


@typed
def weights_figure(metrics: Metrics) -> "matplotlib.figure.Figure":
    """The schedule of the token weights and what it did to the batch, over training steps.

    Args:
        metrics: Reads `endpoint_low`, `endpoint_high`, `weight_mean`, `effective_sample_size`,
            `anchor_share` and `explorer_share`, all after `token_weights/`.

    Returns:
        A figure with four panels: the weights at the ends of the entropy range, the mean weight,
        the effective sample size as a share of all tokens, and the share of the total weight that
        lies on anchors and on explorers.

    Example:
        >>> figure = weights_figure([{"step": 0, "token_weights/weight_mean": 0.9}])
        >>> len(figure.axes)
        4
    """
    panels = (
        (
            "Weight at the ends of the entropy range",
            None,
            (
                ("highest entropy", style.EXPLORER, "endpoint_high"),
                ("lowest entropy", style.ANCHOR, "endpoint_low"),
            ),
        ),
        ("Mean token weight", None, (("", style.ACCENT, "weight_mean"),)),
        (
            "Effective sample size, share of tokens",
            _percent,
            (("", style.ACCENT, "effective_sample_size"),),
        ),
        (
            "Share of total weight",
            _percent,
            (
                ("explorers", style.EXPLORER, "explorer_share"),
                ("anchors", style.ANCHOR, "anchor_share"),
            ),
        ),
    )
    with style.figure_style():
        figure = _figure(width=8.0, height=5.6)
        for axes, (title, unit, lines) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            axes.set_title(title)
            if unit is not None:
                axes.yaxis.set_major_formatter(unit)
            _draw(
                axes,
                [(name, c, *_series(metrics, f"token_weights/{key}")) for name, c, key in lines],
                from_zero=True,
            )
    return figure


def accuracy_names(evaluations: Metrics) -> list[str]:
    """The names `<name>` of all keys `accuracy/<name>`, in the order in which they first appear."""
    keys = {key: None for line in evaluations for key in line}
    return [key.removeprefix("accuracy/") for key in keys if key.startswith("accuracy/")]


def _figure(*, width: float, height: float) -> "matplotlib.figure.Figure":
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.04, hspace=0.06)
    return Figure(figsize=(width, height), dpi=100, layout=layout)


def _series(metrics: Metrics, key: str) -> tuple[list[float], list[float]]:
    """Ascending steps that logged `key`, and the last value of each; NaN where not finite."""
    for line in metrics:
        if "step" not in line:
            condition, hint = "with the key `step` in every line", "Add the training step."
            raise invalid("figures", "metrics", condition, f"keys {sorted(line)}", hint)
    values = {line["step"]: line[key] for line in metrics if key in line}
    steps = sorted(values)
    return steps, [values[step] if math.isfinite(values[step]) else math.nan for step in steps]


def _moving_mean(values: list[float], window: int) -> list[float]:
    half = window // 2
    means = []
    for position, value in enumerate(values):
        near = [v for v in values[max(0, position - half) : position + half + 1] if v == v]
        means.append(math.fsum(near) / len(near) if value == value else math.nan)
    return means


def _percent(value: float, _: int) -> str:
    return f"{value:.0%}"


def _draw(
    axes: "Axes",
    lines: Sequence[tuple[str, str, list[float], list[float]]],
    *,
    from_zero: bool = False,
) -> None:
    """Draws `(name, color, steps, values)` lines named at their ends, or says "not recorded"."""
    from matplotlib.ticker import MaxNLocator

    labels = []
    for name, color, steps, values in lines:
        ends = [(x, y) for x, y in zip(steps, values, strict=True) if y == y][-1:]
        if not ends:
            continue
        # A line shows no single point, so a short series gets a dot per value.
        marker = "o" if len(values) <= _DOTTED else ""
        axes.plot(steps, values, color=color, marker=marker, markersize=4, clip_on=False)
        labels += [(*end, name, color) for end in ends]
    if not labels:
        place = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "not recorded", color=style.MUTED, **place)
        axes.set_axis_off()
        return
    if from_zero:
        axes.set_ylim(bottom=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel(axes.get_xlabel() or "step")
    style.label_lines(axes, labels)
