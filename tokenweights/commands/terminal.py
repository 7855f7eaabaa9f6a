"""What commands print: text that is safe on a terminal, and tables."""

from collections.abc import Iterable, Sequence

from tokenweights.report.document import visible


def shown(text: str) -> str:
    """Text for a terminal: one line, without characters that would steer it."""
    return "".join(map(visible, text)).replace("\n", " ").replace("\t", " ")


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """The rows of a table as indented lines with aligned columns.

    Example:
        >>> aligned([("layer", "kind"), ("0", "full")])
        ['  layer  kind', '  0      full']
    """
    cells = [tuple(map(shown, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
