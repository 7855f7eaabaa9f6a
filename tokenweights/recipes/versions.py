"""Which versions of a trainer an adapter was tested with."""

import os
import re
import warnings
from importlib.metadata import version

from tokenweights._errors import invalid
from tokenweights._typing import typed

# Set to 1, an untested version is a warning.
ANY_VERSION = "TOKENWEIGHTS_ANY_VERSION"


@typed
def require_version(package: str, lowest: str, below: str) -> None:
    """Raises unless an installed trainer is one of the versions that its adapter was tested with.

    An adapter derives from a trainer's classes, and what they promise holds for tested versions.
    The environment variable `TOKENWEIGHTS_ANY_VERSION=1` makes a warning of the error.

    Args:
        package: Name of the trainer's distribution.
        lowest: The first version that was tested.
        below: The first version beyond; its pre-releases are beyond as well.

    Raises:
        TokenWeightsError: If the installed version is another.

    Example:
        >>> require_version("torch", "2", "999")
    """
    installed = version(package)
    first, found, last = map(_numbers, (lowest, installed, below))
    if first <= found < last:
        return
    hint = f"Install one of these, or set {ANY_VERSION}=1 to try what has not been tested."
    error = invalid("require_version", package, f">={lowest},<{below}", installed, hint)
    if os.environ.get(ANY_VERSION) != "1":
        raise error
    warnings.warn(str(error), stacklevel=2)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
