"""JSON Lines: how the files of a run are appended to, and read back line by line.

Lines are strict JSON in ASCII: `NaN` and `Infinity` are never written. One line is in memory at a
time, in both directions.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenweights._errors import TokenWeightsError, invalid

FilePath = str | os.PathLike[str]
Unreadable = Callable[[str], None]

REPAIR = "A run that was stopped while writing leaves such a line; delete the line."
# Lines are written in ASCII without control characters: of those no half holds such bytes.
NO_TEXT = "That line is no text; delete it, or pass the files of a run."
_CONTROLS = frozenset(range(0x20)) - frozenset(b"\t\r\n")


def append_lines(path: FilePath, objects: Iterable[Mapping[str, Any]]) -> None:
    """Appends objects to a file, one line each; half a line that is there is closed first.

    The folder is made if it is missing.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            # A stopped run may have left half a line: keep the next record off it.
            if file.read(1) != b"\n":
                file.write(b"\n")
        for entry in objects:
            # ASCII escapes carry any token text, lone surrogates of split characters included.
            file.write(json.dumps(entry, allow_nan=False).encode("ascii") + b"\n")
            file.flush()


def read_lines(
    function: str,
    path: FilePath,
    parsed: Callable[[str, dict[str, Any]], Any],
    unreadable: Unreadable | None,
) -> Iterator[Any]:
    """What `parsed` makes of each line, in file order.

    Args:
        function: The public function that reads, for messages.
        path: The file.
        parsed: Called with `file:line` and the line's object; raises `TokenWeightsError`.
        unreadable: Called with the message for a line that cannot be read, which is then left out;
            None raises instead.

    Yields:
        One value per line that could be read.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{os.fspath(path)}:{number}"
            try:
                value = parsed(place, _object(function, place, line))
            except TokenWeightsError as error:
                if unreadable is None:
                    raise
                unreadable(str(error))
                continue
            yield value


def _object(function: str, place: str, line: bytes) -> dict[str, Any]:
    condition = "to hold one JSON object per line"
    try:
        entry = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        text = not isinstance(error, UnicodeDecodeError) and _CONTROLS.isdisjoint(line)
        hint = REPAIR if text else NO_TEXT
        raise invalid(function, "path", condition, f"{place}: {error}", hint) from error
    if not isinstance(entry, dict):
        raise invalid(function, "path", condition, f"{place}: {type(entry)}", REPAIR)
    return entry
