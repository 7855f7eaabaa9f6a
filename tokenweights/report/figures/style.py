"""The look that all figures share, and the only file that knows how matplotlib is told about it.

matplotlib comes with the extra `tokenweights[report]` and is imported when a figure is drawn.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tokenweights.report.document import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# Blue and orange stay apart under every common color blindness, and in grey by lightness.
INK, MUTED, GRID = "#1c1e21", "#62666d", "#e6e5e0"
ANCHOR, EXPLORER, ALL = "#1f6fb2", "#c8560b", "#6b7079"
ACCENT, SECOND = "#2f5d62", "#8a4f7d"

_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "line",
    ANCHOR: "anchor",
    EXPLORER: "explorer",
    ALL: "all",
    ACCENT: "accent",
    SECOND: "second",
}

_RC = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlepad": 10.0,
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.xmargin": 0.0,
    "axes.ymargin": 0.08,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "tokenweights",
}


@contextlib.contextmanager
def figure_style() -> Iterator[None]:
    """The shared style for the duration of a `with` block, whatever the user's own settings are."""
    from matplotlib import style

    with style.context(_RC, after_reset=True):
        yield


def label_lines(axes: "Axes", labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes each line's name at its right end, in its color, moved apart where names would touch.

    Args:
        axes: Axes whose vertical limits are final.
        labels: `(x, y, text, color)` of each line's last point.
    """
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / axes.figure.dpi * 72
    points = sorted(labels, key=lambda label: label[1])
    heights = _apart([(y - low) / (high - low) * height for _, y, _, _ in points], gap=11.5)
    for (x, y, text, color), placed in zip(points, heights, strict=True):
        offset = placed - (y - low) / (high - low) * height
        axes.annotate(
            text,
            (x, y),
            xytext=(6, offset),
            textcoords="offset points",
            color=color,
            fontsize=9,
            va="center",
            annotation_clip=False,
            parse_math=False,
        )


def colormap(*, diverging: bool = False) -> "Colormap":
    """Light to dark in one hue; or, if `diverging`, blue through light to orange."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = (ANCHOR, "#f4f2ec", EXPLORER) if diverging else ("#f4f2ec", "#8fb8b9", ACCENT)
    # With more colors matplotlib would draw the color bar as an embedded picture, which the
    # content security policy of a page refuses.
    return LinearSegmentedColormap.from_list("tokenweights", colors, N=48)


def drawable(text: str) -> str:
    """A token's text in the characters of the figures' font: marks for spaces, codes for others."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    shown = "".join(map(visible, text)).replace(" ", "\u00b7")
    shown = shown.replace("\n", "\u21b5").replace("\t", "\u21e5") or "\u2205"
    return "".join(c if font.get_char_index(ord(c)) else f"U+{ord(c):04X}" for c in shown)


def figure_svg(figure: "Figure", *, name: str) -> str:
    """A figure as an SVG element that follows the colors of the page around it.

    The colors of this file become CSS variables with the drawn color as fallback, and text stays
    text. Ids carry `name`, so that several figures can stand in one page.

    Args:
        figure: A figure of this package.
        name: Word that starts every id.

    Returns:
        One `<svg>` element.
    """
    buffer = io.StringIO()
    with figure_style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"(\bid=\"|url\(#|href=\"#)", rf"\1{name}-", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable}, {color})")
    return text


def _apart(positions: list[float], *, gap: float) -> list[float]:
    """Ascending positions moved as little as needed to lie at least `gap` apart."""
    placed = list(positions)
    for _ in range(100):
        for low in range(len(placed) - 1):
            overlap = gap - (placed[low + 1] - placed[low])
            if overlap > 1e-9:
                placed[low] -= overlap / 2
                placed[low + 1] += overlap / 2
    return placed
