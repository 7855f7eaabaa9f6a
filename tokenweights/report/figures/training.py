"""Figures of one run, drawn from its metrics; each returns a matplotlib `Figure` of its own.

`metrics` and `evaluations` are flat dictionaries with the key `step`, as `read_metrics` returns
them. Lines are sorted by step; when a step was logged twice, after a resumed run for example, the
last value counts. NaN is drawn as a gap, and a panel without any value says "not recorded". The
trainers log reward and response length under different names; each of these is understood.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tokenweights._typing import typed
from tokenweights.report.figures import style
from tokenweights.report.figures.panels import (
    Line,
    Metrics,
    draw_lines,
    figure_of,
    first_recorded,
    line_of,
    moving_mean,
    percent,
    series,
)

if TYPE_CHECKING:
    import matplotlib.figure

# What TRL, VeRL and OpenRLHF call them.
REWARD = ("reward", "critic/rewards/mean", "critic/score/mean")
LENGTH = ("completions/mean_length", "response_length/mean", "response_length")
# Held-out accuracy: this library's own prefix, and that of VeRL's validation.
ACCURACY = ("accuracy/", "val-core/")

_SMOOTHING_SHARE = 0.05
_KIND_TITLES = {
    "normalized": "Normalized",
    "raw": "Raw, nats",
    "topk": "Largest weights, nats",
    "fixed": "First keys, nats",
}


@typed
def learning_figure(metrics: Metrics, evaluations: Metrics = ()) -> "matplotlib.figure.Figure":
    """Training reward and held-out accuracy over training steps (Figures 2, 5 and 6, one run).

    The reward is drawn twice: each step thin, and a centred mean over about a twentieth of the run
    thick. A step without a reward stays a gap.

    Args:
        metrics: Reads `reward`, or what VeRL calls it.
        evaluations: Reads every key `accuracy/<name>` as a share in $[0, 1]$ and draws it as
            line `<name>`; `samples` and `prompts`, if all lines have the same, are named.

    Returns:
        A figure with two panels.

    Example:
        >>> figure = learning_figure([{"step": 0, "reward": -1.0}], [])
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['Training reward', 'Held-out accuracy']
    """
    colors = (style.ACCENT, style.SECOND, style.INK, style.MUTED)
    with style.figure_style():
        figure = figure_of()
        reward, accuracy = figure.subplots(1, 2)
        reward.set_title("Training reward")
        steps, values = series(metrics, first_recorded(metrics, REWARD))
        lines = [Line("", style.ACCENT, steps, values)]
        window = 2 * round(len(steps) * _SMOOTHING_SHARE / 2) + 1
        if window > 1 and steps:
            means = moving_mean(values, window)
            lines = [
                Line("", style.ACCENT, steps, values, faint=True),
                Line("", style.ACCENT, steps, means),
            ]
            reward.set_xlabel(f"step (thick: mean over {window} steps)")
        draw_lines(reward, lines)
        accuracy.set_title(_accuracy_title(evaluations))
        accuracy.yaxis.set_major_formatter(percent)
        keys = accuracy_keys(evaluations)
        pairs = zip(keys.items(), colors * len(keys), strict=False)
        lines = [line_of(evaluations, key, name, color) for (key, name), color in pairs]
        draw_lines(accuracy, lines, from_zero=True)
    return figure


@typed
def dynamics_figure(
    metrics: Metrics, *, prefix: str = "token_weights/", title: str = "Attention entropy"
) -> "matplotlib.figure.Figure":
    """Attention entropy of anchors, explorers and all tokens, and response length (Figures 20-23).

    A line is the mean over the tokens of a group, its band one standard deviation of the tokens'
    entropies to either side: the spread within the group, not an error of the mean.

    Args:
        metrics: Reads `entropy_mean` and `entropy_std`, the same with `anchor_` and `explorer_`
            before `entropy`, all after `prefix`, and `completions/mean_length` or what VeRL and
            OpenRLHF call it.
        prefix: What stands before the names of the entropies: another one for another kind.
        title: Name of the entropy, with its unit if it has one.

    Returns:
        A figure with two panels.

    Example:
        >>> figure = dynamics_figure([{"step": 0, "token_weights/entropy_mean": 0.6}])
        >>> figure.axes[1].texts[0].get_text()
        'not recorded'
    """
    with style.figure_style():
        figure = figure_of()
        entropy, length = figure.subplots(1, 2, width_ratios=(3, 2))
        # Beside the other panel a long title needs a second line.
        join = "\n" if len(title) > len("Attention entropy") else ", "
        entropy.set_title(f"{title}{join}mean ± std of tokens")
        draw_lines(entropy, _groups(metrics, prefix))
        length.set_title("Mean response length, tokens")
        key = first_recorded(metrics, LENGTH)
        draw_lines(length, [line_of(metrics, key, "", style.ACCENT)], from_zero=True)
    return figure


@typed
def kinds_figure(metrics: Mapping[str, Metrics]) -> "matplotlib.figure.Figure":
    """Other kinds of attention entropy over training, a panel for each (Figures 21 to 23).

    Args:
        metrics: By the kind of the entropy, what `entropy_metrics` returns for it.

    Returns:
        A figure with a panel per kind: the means of explorers, all tokens and anchors, each with a
        band of one standard deviation of the tokens' entropies to either side.

    Example:
        >>> figure = kinds_figure({"raw": [{"step": 0, "entropy_mean": 2.1}], "topk": []})
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['Raw, nats', 'Largest weights, nats']
    """
    with style.figure_style():
        figure = figure_of()
        panels = figure.subplots(1, max(len(metrics), 1), squeeze=False)[0]
        for axes, (kind, lines) in zip(panels, metrics.items(), strict=False):
            axes.set_title(_KIND_TITLES.get(kind, kind))
            draw_lines(axes, _groups(lines, ""))
    return figure


def _groups(metrics: Metrics, prefix: str) -> list[Line]:
    """The entropies of explorers, all tokens and anchors, each with its spread."""
    groups = (
        ("explorers", style.EXPLORER, f"{prefix}explorer_entropy"),
        ("all tokens", style.ALL, f"{prefix}entropy"),
        ("anchors", style.ANCHOR, f"{prefix}anchor_entropy"),
    )
    return [
        line_of(metrics, f"{key}_mean", name, color, spread=f"{key}_std")
        for name, color, key in groups
    ]


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
    ends = (
        ("highest entropy", style.EXPLORER, "endpoint_high"),
        ("lowest entropy", style.ANCHOR, "endpoint_low"),
    )
    shares = (
        ("explorers", style.EXPLORER, "explorer_share"),
        ("anchors", style.ANCHOR, "anchor_share"),
    )
    size = (("", style.ACCENT, "effective_sample_size"),)
    panels = (
        ("Weight at the ends of the entropy range", None, ends),
        ("Mean token weight", None, (("", style.ACCENT, "weight_mean"),)),
        ("Effective sample size, share of tokens", percent, size),
        ("Share of total weight", percent, shares),
    )
    with style.figure_style():
        figure = figure_of(height=5.6)
        for axes, (title, unit, lines) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            axes.set_title(title)
            if unit is not None:
                axes.yaxis.set_major_formatter(unit)
            drawn = [line_of(metrics, f"token_weights/{key}", name, c) for name, c, key in lines]
            draw_lines(axes, drawn, from_zero=True)
    return figure


def _accuracy_title(evaluations: Metrics) -> str:
    """With k of mean@k and the number of prompts, where every evaluation has the same."""
    samples, prompts = ({line.get(key) for line in evaluations} for key in ("samples", "prompts"))
    title = "Held-out accuracy"
    if len(samples) == 1 and None not in samples:
        title += f", mean@{samples.pop():.0f}"
    if len(prompts) == 1 and None not in prompts:
        title += f", n = {prompts.pop():.0f} each"
    return title


def accuracy_keys(evaluations: Metrics) -> dict[str, str]:
    """Keys of held-out accuracies and the names they are shown by, in the order of appearance."""
    keys = {key: None for line in evaluations for key in line}
    return {
        key: key.removeprefix(prefix)
        for key in keys
        for prefix in ACCURACY
        if key.startswith(prefix)
    }
