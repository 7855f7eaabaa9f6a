"""Recipe and seed of a run: what `run.json` says of them, and else the name of its directory."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenweights._errors import TokenWeightsError, invalid
from tokenweights._typing import typed
from tokenweights.recipes import recipe, recipe_names
from tokenweights.report.figures.panels import Metrics
from tokenweights.report.lines import FilePath, Unreadable
from tokenweights.report.runs import run_from_directory


@dataclass(frozen=True)
class RecipeRun:
    """One run of a comparison.

    Attributes:
        recipe: Name of its recipe.
        seed: Its seed.
        metrics: Flat dictionaries with the key `step`, as `read_metrics` returns them.
        description: The recipe in words, as `Recipe.describe` gives; empty if unknown.
        place: Where it was read, for messages.

    Example:
        >>> RecipeRun("full", 0, [{"step": 0, "reward": -1.0}]).place
        ''
    """

    recipe: str
    seed: int
    metrics: Metrics
    description: str = ""
    place: str = ""


@typed
def recipe_run_from_directory(
    directory: FilePath, *, unreadable: Unreadable | None = None
) -> RecipeRun:
    """The run that a directory holds, with its recipe and its seed; token records are not read.

    `run.json` names the recipe, by its name, its fields or the text of `Recipe.describe`, and the
    seed, under `seed` or in `settings`. What it does not name is read from the directory's own
    name, `RECIPE-seedN` or `RECIPE/seedN`. Evaluations and gradient probes count as metrics.

    Args:
        directory: A run directory, as `run_from_directory` takes it.
        unreadable: Called with a message for each line that cannot be read, which is then left
            out. None raises instead.

    Returns:
        The run.

    Raises:
        TokenWeightsError: If the directory is missing or without metrics, its recipe or seed is
            unknown, `run.json` holds neither, or, if `unreadable` is None, a line cannot be read.

    Example:
        >>> import tempfile
        >>> from tokenweights.report import append_metrics
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     append_metrics(f"{folder}/full-seed3/metrics.jsonl", {"step": 0, "reward": -1.0})
        ...     run = recipe_run_from_directory(f"{folder}/full-seed3")
        >>> run.recipe, run.seed
        ('full', 3)
    """
    folder, refused = Path(directory), partial(invalid, "recipe_run_from_directory", "directory")
    place = os.fspath(directory)
    if not folder.is_dir():
        raise refused("to be a directory", place, "Pass the directory of a run.")
    found = _described(folder)
    named = _named(folder)
    name, seed = found.name or named.name, named.seed if found.seed is None else found.seed
    if not name or seed is None:
        missing = " and ".join(
            [*(["recipe"] if not name else []), *(["seed"] if seed is None else [])]
        )
        hint = (
            'Write {"recipe": NAME, "settings": {"seed": N}} into its run.json, or call it '
            "NAME-seedN or NAME/seedN."
        )
        raise refused("of a run with a known recipe and seed", f"{place}: no {missing}", hint)

    def told(message: str) -> None:
        # A report refuses keys of `run.json` that a comparison reads, and its recipe and seed have
        # been found.
        if "expected `run.json`" not in message and unreadable is not None:
            unreadable(message)

    try:
        run = run_from_directory(
            folder, unreadable=None if unreadable is None else told, progress=lambda _: ()
        )
    except OverflowError as error:
        raise refused("with numbers that a float holds", f"{place}: {error}", "Correct it.") from (
            error
        )
    metrics = [*run.metrics, *run.evaluations, *run.gradients]
    if not metrics:
        raise refused("with metrics", f"{place}: no step", "Append metrics while the run trains.")
    return RecipeRun(name, seed, metrics, found.description if found.name else "", place)


@dataclass(frozen=True)
class _Identity:
    name: str | None = None
    description: str = ""
    seed: int | None = None


def _described(folder: Path) -> _Identity:
    """What `run.json` says of recipe and seed."""
    path = folder / "run.json"
    if not path.is_file():
        return _Identity()
    refused = partial(invalid, "recipe_run_from_directory", "run.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise refused("to be JSON", f"{path}: {error}", "Write one JSON object.") from error
    if not isinstance(found, dict):
        raise refused("to be one JSON object", path, "Write one JSON object.")
    settings = found.get("settings")
    seed = found.get("seed")
    if seed is not None and not _is_whole(seed):
        raise refused("with a whole number as seed", f"{path}: {seed!r}", "Write a number.")
    if seed is None and isinstance(settings, dict) and _is_whole(settings.get("seed")):
        seed = settings["seed"]
    try:
        return _Identity(*_recipe(found.get("recipe")), seed=seed)
    except TokenWeightsError as error:
        hint = "Write a recipe's name or its fields."
        raise refused("with a recipe", f"{path}: {error}", hint) from error


def _recipe(value: Any) -> tuple[str | None, str]:
    """Name and description of a recipe by name, by its fields, or by its description."""
    if isinstance(value, Mapping):
        made = recipe(value)
        return made.name, made.describe()
    if not isinstance(value, str):
        return None, ""
    text = value.strip()
    first = _DESCRIPTION.match(text)
    if first:
        return first[1].strip(), text
    if text in recipe_names():
        return text, recipe(text).describe()
    # Words about a recipe are no name of one.
    return (text if len(text.splitlines()) == 1 else None), ""


def _named(folder: Path) -> _Identity:
    """What the directory's name says: `RECIPE-seedN`, or `seedN` in a directory `RECIPE`."""
    path = Path(os.path.abspath(folder))  # `.` has no name of its own
    whole = _NAME.fullmatch(path.name)
    if whole is None or not (whole[1] or path.parent.name):
        return _Identity()
    return _Identity(whole[1] or path.parent.name, seed=int(whole[2]))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_DESCRIPTION = re.compile(r"recipe {2,}(\S.*)\n")
_NAME = re.compile(r"(?:(.+)-)?seed([0-9]{1,18})")
