"""The options that every trainer adapter has, under the same names."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tokenweights._errors import invalid
from tokenweights.recipes.recipe import Recipe
from tokenweights.recipes.rollout import rollout_recipe

# The options that name files.
FILES = ("token_records", "gradient_probe_file", "metrics_file")


def _option(text: str, kind: type = str) -> dict[str, Any]:
    """What a command line has to know of a field."""
    return {"help": text, "type": kind}


@dataclass(frozen=True)
class TokenWeightsConfig:
    """What a run asks of a trainer adapter; an adapter adds what its trainer must be for it.

    Paths are made absolute, because the process that writes a file may have another working
    directory than the one that read the option. `metadata` of a field holds `help` and `type` for a
    command line.

    Args:
        recipe: A recipe, its name, or a mapping of its fields with `name` first, also as JSON.
        token_records: JSONL file to which token records are appended; None writes none.
        token_records_steps: Training steps between two recorded rollout batches, >= 1.
        gradient_probe_steps: Training steps between two gradient probes, >= 1; None probes never.
        gradient_probe_file: JSONL file to which each probe appends a line; None writes none.
        gradient_probe_tolerance: Largest distance of the sum of a probe's projection ratios from
            one, > 0; beyond it the probe raises. None follows from the precision; see
            `GradientSeries.metrics`.
        metrics_file: JSONL file to which the numbers of the trainer's log are appended, a line for
            each step, as a report reads them; None writes none.

    Raises:
        TokenWeightsError: If the recipe is unknown or does not fit the other options.

    Example:
        >>> TokenWeightsConfig("low2high").token_recipe.denominator
        'all_tokens'
    """

    recipe: Recipe | Mapping[str, Any] | str | None = field(
        default=None, metadata=_option("a recipe's name, or its fields as a JSON dict (required)")
    )
    token_records: str | None = field(
        default=None, metadata=_option("JSONL file to which token records are appended")
    )
    token_records_steps: int = field(
        default=100, metadata=_option("training steps between two recorded rollout batches", int)
    )
    gradient_probe_steps: int | None = field(
        default=None, metadata=_option("training steps between two gradient probes", int)
    )
    gradient_probe_file: str | None = field(
        default=None, metadata=_option("JSONL file to which each probe appends a line")
    )
    gradient_probe_tolerance: float | None = field(
        default=None,
        metadata=_option("largest distance of a probe's projection ratios' sum from one", float),
    )
    metrics_file: str | None = field(
        default=None, metadata=_option("JSONL file to which each step's metrics are appended")
    )

    def __post_init__(self) -> None:
        probed = self.gradient_probe_steps is not None
        self._require(
            self.token_recipe.entropy is not None or self.token_records is None,
            "token_records",
            "None",
            "A record holds attention entropies; the recipe has none.",
        )
        for name in ("token_records_steps", *(["gradient_probe_steps"] if probed else [])):
            steps = getattr(self, name)
            whole = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1
            self._require(whole, name, ">= 1", "It is a number of training steps.")
        self._require(
            probed or self.gradient_probe_file is None,
            "gradient_probe_file",
            "None",
            "Set gradient_probe_steps too.",
        )
        tolerance = self.gradient_probe_tolerance
        number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
        positive = tolerance is None or (number and tolerance > 0)
        self._require(positive, "gradient_probe_tolerance", "> 0", "Leave it out, or try 1e-3.")
        for name in FILES:
            self._make_absolute(name)
        files = [getattr(self, name) for name in FILES if getattr(self, name) is not None]
        for name in FILES:
            alone = files.count(getattr(self, name)) <= 1
            self._require(alone, name, "a file of its own", "Each file has lines of one kind.")

    @classmethod
    def from_mapping(cls, asked: Mapping[str, Any]) -> "TokenWeightsConfig":
        """The options that a mapping gives, as a part of a trainer's configuration does.

        Args:
            asked: Options by their names; those left out have their defaults.

        Returns:
            The options.

        Raises:
            TokenWeightsError: If there is no such option, or the options are wrong.

        Example:
            >>> TokenWeightsConfig.from_mapping({"recipe": "low2high"}).token_records_steps
            100
        """
        known = [option.name for option in fields(cls)]
        if unknown := sorted(set(asked) - set(known)):
            hint = f"Known are {', '.join(known)}."
            raise invalid("TokenWeightsConfig", "asked", "without unknown keys", unknown, hint)
        return cls(**asked)

    @property
    def token_recipe(self) -> Recipe:
        """The recipe that `recipe` names."""
        return rollout_recipe(self.recipe, caller="TokenWeightsConfig")

    def _make_absolute(self, name: str) -> None:
        given = getattr(self, name)
        if given is None:
            return
        self._require(isinstance(given, str | os.PathLike), name, "a path", "Pass a string.")
        path = Path(given).absolute()
        self._require(not path.is_dir(), name, "a file", "This is a folder.")
        above = next(folder for folder in path.parents if folder.exists())
        self._require(above.is_dir(), name, "a file in a folder", f"{above} is a file.")
        object.__setattr__(self, name, str(path))

    def _require(self, fits: bool, name: str, condition: str, hint: str) -> None:
        if not fits:
            raise invalid("TokenWeightsConfig", name, condition, repr(getattr(self, name)), hint)
