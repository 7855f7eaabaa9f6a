"""Small figures of the records, as SVG."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper.arms import CORE
from paper.data import WARM_STARTS, Data, data_of, hard

FOLDER = Path(__file__).parent / "figures"
GROUPS = {"random": "#777777", "anchor": "#1f77b4", "explorer": "#d62728"}


@dataclass(frozen=True)
class Figure:
    """A figure of the results.

    Attributes:
        file: Name of the file.
        draw: Draws the data into axes, one for each warm start.
        size: Width and height, inches.
    """

    file: str
    draw: Callable[[Any, Data, str], None]
    size: tuple[float, float] = (11.0, 2.8)


def _differences(axes: Any, data: Data, warm_start: str) -> None:
    """Hard accuracy at the end against full training, with intervals."""
    names = [name for name in CORE if name != "full"]
    found = [data.difference(warm_start, name, "full", hard) for name in names]
    for place, each in enumerate(found):
        if each.count >= 2:
            axes.plot([each.low, each.high], [place, place], color="#1f77b4", lw=2)
            axes.plot([each.mean], [place], "o", color="#1f77b4", ms=4)
    axes.axvline(0, color="#999999", lw=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("hard - full", fontsize=7)


def _cosines(axes: Any, data: Data, warm_start: str) -> None:
    """Cosine of each subset's gradient along training, one line a seed."""
    for record in data.probes.get(warm_start, {}).values():
        for group, color in GROUPS.items():
            held = [probe for probe in record["probes"] if "gradients" in probe]
            values = [probe["gradients"][group]["cosine"] for probe in held]
            axes.plot([probe["step"] for probe in held], values, color=color, lw=1, label=group)
    handles, labels = axes.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    if shown:
        axes.legend(shown.values(), shown.keys(), fontsize=6, frameon=False)
    axes.set_ylim(-0.3, 1.05)
    axes.set_xlabel("update", fontsize=7)


def _tenths(axes: Any, data: Data, warm_start: str) -> None:
    """Projection of every tenth along training, the mean over seeds."""
    columns: dict[int, list[list[float]]] = {}
    for record in data.probes.get(warm_start, {}).values():
        for probe in record["probes"]:
            if "gradients" in probe:
                columns.setdefault(probe["step"], []).append(probe["gradients"]["tenths"])
    if not columns:
        return
    steps = sorted(columns)
    means = [[sum(each) / len(each) for each in zip(*columns[s], strict=True)] for s in steps]
    table = [list(each) for each in zip(*means, strict=True)]
    shown = axes.imshow(table, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set_xticks(range(len(steps)), steps)
    axes.set_yticks(range(0, 10, 3))
    axes.set_ylabel("tenth by attention entropy", fontsize=6)
    axes.set_xlabel("update", fontsize=7)
    bar = axes.figure.colorbar(shown, ax=axes, fraction=0.05)
    bar.ax.tick_params(labelsize=6)
    bar.set_label("projection", fontsize=6)


def _curves(axes: Any, data: Data, warm_start: str) -> None:
    """Reward of core arms along training, the mean over seeds."""
    shown = ("full", "random20", "anchor20", "explorer20", "low2high", "predictive_high20")
    for name in shown:
        runs = list(data.runs.get(warm_start, {}).get(name, {}).values())
        if runs:
            rewards = zip(*(run["history"]["reward"] for run in runs), strict=True)
            means = [sum(each) / len(each) for each in rewards]
            smooth = [sum(means[max(0, n - 3) : n + 1]) / len(means[max(0, n - 3) : n + 1])
                      for n in range(len(means))]  # fmt: skip
            axes.plot(smooth, lw=1.2, label=name)
    if axes.lines:
        axes.legend(fontsize=5, frameon=False)
    axes.set_xlabel("update", fontsize=7)


FIGURES: dict[str, Figure] = {
    "claims": Figure("differences.svg", _differences, (12.0, 3.2)),
    "tasks": Figure("rewards.svg", _curves),
    "gradients": Figure("cosines.svg", _cosines),
    "tenths": Figure("tenths.svg", _tenths),
}


def write_figures(folder: Path, *, only: str | None = None, target: Path = FOLDER) -> None:
    """Writes the figures of a folder of records, or one of them."""
    import matplotlib

    matplotlib.use("Agg")
    # The same records give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "paper"
    import matplotlib.pyplot as plt

    target.mkdir(exist_ok=True)
    data = data_of(folder)
    for name, figure in FIGURES.items():
        if only not in (None, name):
            continue
        shown, panels = plt.subplots(1, len(WARM_STARTS), figsize=figure.size, layout="constrained")
        for axes, warm_start in zip(panels, WARM_STARTS, strict=True):
            figure.draw(axes, data, warm_start)
            axes.set_title(warm_start, fontsize=8)
            if not axes.lines[1:] and not axes.images:
                axes.text(0.5, 0.5, "no run yet", ha="center", fontsize=7, transform=axes.transAxes)
            axes.tick_params(labelsize=6)
        shown.savefig(target / figure.file, metadata={"Date": None})
        plt.close(shown)
