"""Packages that belong to an extra of the distribution."""

import importlib
from types import ModuleType

from tokenweights._errors import invalid


def imported(module: str, *, extra: str) -> ModuleType:
    """A module of an extra, or an error that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        hint = f"Install it with: pip install 'tokenweights[{extra}]'."
        raise invalid("tokenweights", module, "to be installed", "no such package", hint) from error
