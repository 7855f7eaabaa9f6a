"""Figures of the GPU run: small SVG files, lines over the number of tokens, light and dark in one.

They are written by hand, so that the results of a machine can be drawn where nothing is installed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 660, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 216, 52, 42
# The colors of the library's pages, on light ground and where a reader's settings ask for dark.
STYLES = """
svg { --paper: #fdfdfb; --ink: #1c1e21; --muted: #62666d; --line: #e6e5e0; --ours: #1f6fb2;
  --second: #8a4f7d; --third: #2f5d62; --other: #c8560b; }
@media (prefers-color-scheme: dark) { svg { --paper: #15171a; --ink: #eceae4; --muted: #a0a5ad;
  --line: #30343a; --ours: #6fb3ea; --second: #d3a0c6; --third: #86c5c1; --other: #f2945a; } }
text { font: 11px system-ui, sans-serif; } .title { font-weight: 600; font-size: 13px; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
path { fill: none; stroke-width: 1.8; } .thin { stroke-width: 1; }
"""
Unit = Callable[[float], str]
OURS = ("entropy", "all statistics", "received")  # how names of the library's own begin
TOY = "toy run: no measurement"


@dataclass(frozen=True)
class Line:
    """Values over tokens under one name."""

    name: str
    points: tuple[tuple[int, float], ...]
    color: str
    dashed: bool = False


def drawn(steps: dict[str, dict[str, Any]]) -> dict[str, str]:
    """SVG texts by file name: times, memory, and ratios to the attention forward.

    Args:
        steps: What each step left, as `results.found_in` reads it.

    Returns:
        Nothing where nothing was timed.
    """
    if "times" not in steps:
        return {}
    about = steps["times"]["about"]
    parts = steps["times"]["parts"].values()
    records = [record for part in parts for record in part.get("found", ())]
    place = TOY if about["toy"] is not False else f"{about['device']}, commit {about['commit']}"
    found = {
        "gpu-times.svg": plot(
            "Seconds per call, medians", place, lines(records, "p50"), unit=seconds, base=10.0
        ),
        "gpu-memory.svg": plot(
            "Peak memory beyond the inputs",
            place,
            lines(records, "peak_bytes"),
            unit=size,
            base=16.0,
        ),
        "gpu-ratios.svg": plot(
            "Time over that of the attention forward (SDPA flash)",
            place,
            ratios(records, "attention forward, SDPA flash"),
            unit=lambda value: f"{value:.4g}",
        ),
    }
    return {name: text for name, text in found.items() if text}


def lines(records: Sequence[dict[str, Any]], field: str) -> list[Line]:
    """A line for each contender that has this number."""
    found = []
    for name in dict.fromkeys(record["name"] for record in records):
        points = sorted(
            (r["tokens"], r[field]) for r in records if r["name"] == name and r.get(field)
        )
        if points:
            dashed = not name.startswith(OURS)
            found.append(Line(name, tuple(points), color(name), dashed))
    return found


def ratios(records: Sequence[dict[str, Any]], base: str) -> list[Line]:
    """Our medians over those of the base at the same number of tokens."""
    times = {line.name: dict(line.points) for line in lines(records, "p50")}
    if base not in times:
        return []
    found = []
    for name, points in times.items():
        if name.startswith(OURS):
            both = [(t, v / times[base][t]) for t, v in points.items() if t in times[base]]
            if both:
                found.append(Line(name, tuple(both), color(name)))
    return found


def color(name: str) -> str:
    """One for each kind of contender."""
    starts = {
        "entropy and": "third",
        "entropy": "ours",
        "all statistics": "second",
        "received": "third",
        "attention forward": "other",
    }
    return next((kind for start, kind in starts.items() if name.startswith(start)), "muted")


def seconds(value: float) -> str:
    """In the unit that needs the fewest digits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1 or unit == "µs":
            return f"{value * factor:.3g} {unit}"
    raise AssertionError("unreachable")


def size(value: float) -> str:
    """Bytes by powers of 1024."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 2**power:
            return f"{value / 2**power:.3g} {unit}"
    return f"{value:.3g} B"


def plot(title: str, place: str, some: list[Line], *, unit: Unit, base: float = 0.0) -> str:
    """One SVG text, empty without lines; names stand at the right ends of their lines.

    Ticks are powers of the base, or without one steps from zero.
    """
    if not some:
        return ""
    tokens = sorted({t for line in some for t, _ in line.points})
    values = [v for line in some for _, v in line.points]
    ticks = powers(values, base) if base else steps_from_zero(max(values))
    scale = math.log if base else float
    low, high = scale(ticks[0]), scale(ticks[-1])

    def across(count: int) -> float:
        if len(tokens) == 1:
            return (WIDTH - RIGHT + LEFT) / 2
        share = math.log(count / tokens[0]) / math.log(tokens[-1] / tokens[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        share = (scale(value) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, words: str, ink: str, style: str = "") -> str:
        place = f'x="{x:.1f}" y="{y:.1f}" class="{style}" fill="var(--{ink})"'
        return f"<text {place}>{escape(words)}</text>"

    def path(way: str, ink: str, style: str = "") -> str:
        return f'<path d="{way}" stroke="var(--{ink})"{style}/>'

    edge, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    body = [text(12, 22, title, "ink", "title"), text(12, 39, place, "muted")]
    for tick in ticks:
        body.append(path(f"M{LEFT} {down(tick):.1f}H{edge}", "line", ' class="thin"'))
        body.append(text(LEFT - 8, down(tick) + 4, unit(tick), "muted", "end"))
    body += [text(across(n), floor + 18, thousands(n), "muted", "middle") for n in tokens]
    body.append(text((LEFT + edge) / 2, HEIGHT - 8, "tokens", "muted", "middle"))
    ends = apart([down(line.points[-1][1]) for line in some], 14.0)
    for line, end in zip(some, ends, strict=True):
        at = [(across(t), down(v)) for t, v in line.points]
        dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
        way = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        body.append(path(way, line.color, dashes))
        dot = f'r="2.6" fill="var(--{line.color})"'
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" {dot}/>' for x, y in at]
        x, y = at[-1]
        body.append(path(f"M{x + 4:.1f} {y:.1f}L{edge + 12} {end:.1f}", "line", ' class="thin"'))
        body.append(text(edge + 16, end + 4, line.name, line.color))
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    label = escape(f"{title}; {place}; {', '.join(line.name for line in some)}", quote=True)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {view} role="img" aria-label="{label}">'
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="var(--paper)"/>'
    return "\n".join([head, f"<style>{STYLES}</style>", ground, *body, "</svg>", ""])


def powers(values: Sequence[float], base: float) -> list[float]:
    """Powers of the base around the values, two at least."""
    low = math.floor(math.log(min(values), base) + 1e-9)
    high = max(math.ceil(math.log(max(values), base) - 1e-9), low + 1)
    return [base**power for power in range(low, high + 1)]


def steps_from_zero(most: float) -> list[float]:
    """Four to eight round steps from zero to beyond the largest value."""
    step = 10.0 ** math.floor(math.log10(most))
    while most / step < 4:
        step /= 2
    return [step * count for count in range(math.ceil(most / step) + 1)]


def thousands(count: int) -> str:
    """`16k` for 16384."""
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights of labels, moved down where two would touch, and up where that leaves the figure."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed, last = list(heights), -math.inf
    for index in order:
        last = placed[index] = max(heights[index], last + gap)
    beyond = HEIGHT - 10.0
    for index in reversed(order):
        beyond = placed[index] = min(placed[index], beyond)
        beyond -= gap
    return placed
