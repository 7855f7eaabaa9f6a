"""What identifies a run, written beside what it logs, so that its report is not anonymous."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tokenweights._typing import typed
from tokenweights.recipes import Recipe
from tokenweights.recipes.config import FILES

_PACKAGES = ("tokenweights", "torch", "transformers")


@typed
def write_run_json(
    config: Any,
    *,
    trainer: str,
    model: str,
    data: str,
    seed: int | None,
    recipe: Recipe | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes `run.json` beside the files of a run, for `run_from_directory` and comparisons.

    It holds the recipe in words, model, data, seed, further settings and the versions of what
    runs. Where the options name no file there is no directory of a run, and nothing is written.

    Args:
        config: Options of an adapter: a `TokenWeightsConfig`, or what has its fields. `run.json`
            goes beside the metrics, else the token records, else the gradient probes.
        trainer: Distribution of the trainer, such as `trl`; its version is written.
        model: Name or path of the model.
        data: Name or path of the training data.
        seed: Seed of the run; None where it has none.
        recipe: The recipe with its layers numbered; None takes that of `config`.
        settings: Further names and values, of what JSON holds.

    Example:
        >>> import tempfile
        >>> from tokenweights import TokenWeightsConfig
        >>> from tokenweights.report import append_metrics, run_from_directory
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = TokenWeightsConfig("full", metrics_file=f"{folder}/metrics.jsonl")
        ...     write_run_json(config, trainer="torch", model="lab", data="sums", seed=3)
        ...     append_metrics(config.metrics_file, {"step": 0, "reward": -1.0})
        ...     run = run_from_directory(folder)
        >>> run.title, run.settings["model"], run.settings["seed"]
        ('full on sums', 'lab', 3)
    """
    order = sorted(FILES, key=("metrics_file", "token_records", "gradient_probe_file").index)
    named = [path for name in order if (path := getattr(config, name)) is not None]
    if not named:
        return
    made = config.token_recipe if recipe is None else recipe
    versions = {name: _version(name) for name in dict.fromkeys((*_PACKAGES, trainer))}
    content = {
        "title": f"{made.name} on {Path(data).name}",
        "recipe": made.describe(),
        "settings": {
            "model": model,
            "data": data,
            **({} if seed is None else {"seed": seed}),
            **(settings or {}),
            **{name: found for name, found in versions.items() if found is not None},
            "python": platform.python_version(),
        },
    }
    path = Path(named[0]).with_name("run.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
