"""How numbers and rows are written on the page."""

import math
import statistics
from collections.abc import Iterable

from paper.comparison import Paired


def row(*cells: object) -> str:
    """A line of a table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def head(*cells: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*cells), row(*("---" for _ in cells))]


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(found: Paired) -> str:
    """A mean difference and its bootstrap interval."""
    if found.count < 2:
        return "-"
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """Mean and standard deviation over seeds, of those that have a number."""
    held = [value for value in values if value is not None and not math.isnan(value)]
    if not held:
        return "-"
    mean = statistics.fmean(held)
    if len(held) < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(held):.{digits}f}"
