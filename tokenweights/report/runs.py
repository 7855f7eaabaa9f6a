"""What a run left behind in its directory.

A run directory of any of the adapters holds these files, each of them optional:

| file | content |
|---|---|
| `run.json` | `title`, `description`, `recipe` and `settings`, see `Run` |
| `metrics.jsonl` | one line per training step, `append_metrics` |
| `evaluations.jsonl` | one line per evaluation with keys `accuracy/<name>`, `append_metrics` |
| `tokens.jsonl` | token records, `append_token_records` |
| `gradient.jsonl` | one line per gradient probe, `append_metrics` |

A run that stopped and went on from a checkpoint takes some steps twice. Of metrics, evaluations and
probes the last value of a step counts, of token records the last of a response in its step. Lines
of one step are one: trainers log evaluations and a summary beside what the step itself gave.

Without `metrics.jsonl` the log history of the newest `trainer_state.json` stands in, which the
trainers of transformers and TRL write into the directory and its checkpoints.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenweights._errors import TokenWeightsError, invalid
from tokenweights._typing import typed
from tokenweights.report.dynamics import with_other_kinds
from tokenweights.report.lines import FilePath, Unreadable
from tokenweights.report.records import TokenRecord, read_metrics, read_token_records

Progress = Callable[[Iterable[Any]], Iterable[Any]]

FILES = ("metrics.jsonl", "trainer_state.json", "tokens.jsonl", "gradient.jsonl")
_STATE_PLACES = ("trainer_state.json", "*/trainer_state.json", "*/*/trainer_state.json")


@dataclass(frozen=True)
class Run:
    """What a run left behind, as its report shows it.

    Attributes:
        title: Title of the report.
        description: What was trained and how, as plain text; an empty line starts a paragraph.
        recipe: The recipe in words, such as `Recipe.describe` gives; its line breaks are kept.
        settings: Names and values, shown as they are.
        metrics: One flat dictionary per training step, with the key `step`.
        evaluations: One flat dictionary per evaluation, with `step` and keys `accuracy/<name>`.
        records: Responses; the report shows one of the first step and one of the last, and draws
            the tokens of the last step.
        gradients: One flat dictionary per gradient probe, with `step` and keys `gradient/<name>`.
        entropies: `entropy_metrics` by kind, of the kinds that the records have as columns.
        unreadable: What could not be read, one message each.

    Example:
        >>> run = Run(title="low2high", metrics=[{"step": 0, "reward": -1.0}])
        >>> run.records
        ()
    """

    title: str = "Training run"
    description: str = ""
    recipe: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, float]] = ()
    evaluations: Sequence[Mapping[str, float]] = ()
    records: Sequence[TokenRecord] = ()
    gradients: Sequence[Mapping[str, float]] = ()
    entropies: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    unreadable: Sequence[str] = ()

    @property
    def gradient_probes(self) -> list[Mapping[str, float]]:
        """The lines with numbers of gradients; without a file of their own, of the metrics."""
        lines = self.gradients or self.metrics
        return [line for line in lines if any(name.startswith("gradient/") for name in line)]


@typed
def run_from_directory(
    directory: FilePath,
    *,
    unreadable: Unreadable | None = None,
    progress: Progress | None = None,
) -> Run:
    """The run that a directory holds, with the responses of its first and of its last step.

    Token records are read one at a time and those of two steps are kept (of a third while it is
    read, where they have columns), so memory does not grow with the length of the run.

    Args:
        directory: A run directory as this module describes it, each file being optional.
        unreadable: Called with a message for each line or file that cannot be read, which is then
            left out and named in the report. None raises instead.
        progress: Wraps the iterator of token records, as `tqdm` does.

    Returns:
        The run.

    Raises:
        TokenWeightsError: There is no file of a run, or, if `unreadable` is None, a file does not
            hold what it should.

    Example:
        >>> import tempfile
        >>> from tokenweights.report import append_metrics
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     append_metrics(f"{folder}/metrics.jsonl", {"step": 0, "reward": -1.0})
        ...     run_from_directory(folder).metrics
        [{'step': 0, 'reward': -1.0}]
    """
    folder = Path(directory)
    if not folder.is_dir():
        hint = "Pass the directory that a run writes into."
        raise invalid("run_from_directory", "directory", "that exists", os.fspath(directory), hint)
    states = [path for place in _STATE_PLACES for path in folder.glob(place)]
    if not states and not any((folder / name).is_file() for name in FILES):
        got, hint = os.fspath(directory), "Append metrics while the run trains."
        condition = f"to hold one of {', '.join(FILES)}"
        raise invalid("run_from_directory", "directory", condition, got, hint)
    messages: list[str] = []

    def told(message: str) -> None:
        messages.append(message)
        assert unreadable is not None
        unreadable(message)

    tell = None if unreadable is None else told

    def lines(name: str) -> Sequence[Mapping[str, float]]:
        path = folder / name
        if not path.is_file():
            return ()
        merged: dict[float, dict[str, float]] = {}
        for line in read_metrics(path, unreadable=tell):
            merged.setdefault(line["step"], {}).update(line)
        return [*merged.values()]

    described = _tolerated(lambda: _description(folder / "run.json"), tell) or {}
    metrics = lines("metrics.jsonl")
    if not metrics and states:
        metrics = _log_history(states, tell)
    records: Sequence[TokenRecord] = ()
    entropies: dict[str, list[dict[str, float]]] = {}
    if (folder / "tokens.jsonl").is_file():
        found = read_token_records(folder / "tokens.jsonl", unreadable=tell)
        shown = found if progress is None else progress(found)
        records = outer_steps(with_other_kinds(shown, entropies))
    return Run(
        **described,
        metrics=metrics,
        evaluations=lines("evaluations.jsonl"),
        records=records,
        gradients=lines("gradient.jsonl"),
        entropies=entropies,
        unreadable=tuple(messages),
    )


def outer_steps(records: Iterable[TokenRecord]) -> tuple[TokenRecord, ...]:
    """The records of the first step and of the last, in this order; read once, two steps held.

    Of a response that was recorded twice in a step, as a resumed run does, the last record counts.
    """
    first: dict[int, TokenRecord] = {}
    last: dict[int, TokenRecord] = {}
    low, high = math.inf, -math.inf
    for record in records:
        if record.step < low:
            low, first = record.step, {}
        if record.step == low:
            first[record.sample_id] = record
        if record.step > high:
            high, last = record.step, {}
        if record.step == high:
            last[record.sample_id] = record
    return (*first.values(), *(last.values() if low < high else ()))


def _tolerated(read: Callable[[], Any], tell: Unreadable | None) -> Any:
    try:
        return read()
    except TokenWeightsError as error:
        if tell is None:
            raise
        tell(str(error))
        return None


def _description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    kinds = {"title": str, "description": str, "recipe": str, "settings": dict}
    described = _json(path, "run.json")
    valid = isinstance(described, dict) and all(
        name in kinds and isinstance(value, kinds[name]) for name, value in described.items()
    )
    if not valid:
        condition = "to hold the texts `title`, `description`, `recipe` and the object `settings`"
        raise invalid("run_from_directory", "run.json", condition, path, "Leave other keys out.")
    return described


def _log_history(states: Sequence[Path], tell: Unreadable | None) -> list[dict[str, float]]:
    """The log history of the state with the largest step, without what is no number."""
    newest: dict[str, Any] = {}
    for path in states:
        state = _tolerated(lambda path=path: _state(path), tell)
        if state is not None and state["global_step"] >= newest.get("global_step", -1):
            newest = state
    return [
        {name: float(value) for name, value in entry.items() if _is_number(value)}
        for entry in newest.get("log_history", ())
        if isinstance(entry, dict) and _is_number(entry.get("step"))
    ]


def _state(path: Path) -> dict[str, Any]:
    state = _json(path, "trainer_state.json")
    known = isinstance(state, dict) and isinstance(state.get("global_step"), int)
    if not known or not isinstance(state.get("log_history"), list):
        condition, hint = "to hold `global_step` and `log_history`", "Delete the file."
        raise invalid("run_from_directory", "trainer_state.json", condition, path, hint)
    return state


def _json(path: Path, name: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        got, hint = f"{path}: {error}", "Write one JSON object."
        raise invalid("run_from_directory", name, "to be JSON", got, hint) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isinf(value)
