"""Where a command writes, looked at before the work whose result could not be written."""

import os
from functools import partial
from pathlib import Path

from tokenweights._errors import invalid


def require_output(command: str, path: Path, *, folder: bool = False) -> None:
    """Raises unless `--output` is a file, or a directory, that is there or can be made.

    Args:
        command: The command that writes, for messages.
        path: Where it shall write.
        folder: Whether it writes a directory, and no file.

    Raises:
        TokenWeightsError: If it is the other, lies in a file, or where nothing may be written.
    """
    condition = "a directory" if folder else "a file"
    refused = partial(invalid, command, "--output", condition)
    if os.path.lexists(path) and path.is_dir() != folder:
        kind, hint = "a file", "Name a directory, which need not exist."
        if not folder:
            kind, hint = "a directory", "Name a file in it."
        raise refused(f"{path}, {kind}", hint)
    inner = path if folder else path.parent
    there = next((each for each in (inner, *inner.parents) if os.path.lexists(each)), Path())
    if not there.is_dir():
        raise refused(f"{path}, where {there} is no directory", "Name another place.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise refused(f"{path}, where {there} takes no files", "Name another place.")
