"""What signals and rules have in common: frozen records that check their fields and name columns.

A part of your own needs none of this: any callable of the right signature is a signal or a rule.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, ClassVar, Literal, Protocol, get_args, get_origin, runtime_checkable

import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from tokenweights._errors import TokenWeightsError, invalid, nearest
from tokenweights.distributed import is_shared
from tokenweights.recipes.batch import COLUMNS, RolloutBatch


@runtime_checkable
class Signal(Protocol):
    """One score for each token of a batch.

    Class attributes that a signal may have: `columns`, the names of the columns it reads beside
    those that every batch has.
    """

    def __call__(self, batch: RolloutBatch, /) -> Float[Tensor, "batch token"]:
        """Scores, finite under the mask."""
        ...


@runtime_checkable
class Rule(Protocol):
    """Weights of a batch's tokens, >= 0, from their scores.

    Class attributes that a rule may have: `columns` as a signal, and `scored`, whether it needs
    scores, as one does that does not say so; a rule that says False is given None.
    """

    def __call__(
        self,
        scores: Float[Tensor, "batch token"] | None,
        batch: RolloutBatch,
        /,
        *,
        step: int,
        group: dist.ProcessGroup | None = None,
    ) -> Float[Tensor, "batch token"]:
        """Weights >= 0, finite and detached."""
        ...


@dataclass(frozen=True, kw_only=True)
class Part:
    """A signal, a rule or a condition of this library: its fields are checked when it is made."""

    kind: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ()
    scored: ClassVar[bool] = True
    # What it cannot do without: `prompt_ids`, and `sample_ids` where several ranks share a batch.
    numbers: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):  # JSON and YAML have lists where a part has tuples
                value = tuple(value)
                object.__setattr__(self, item.name, value)
            _check_type(self.kind, item.name, item.type, value)
        self._check()

    def _check(self) -> None:
        """Raises where the fields do not fit together."""

    def lines(self) -> list[str]:
        """What the part does, in a few lines of text with its equation."""
        raise NotImplementedError

    def require(self, field: str, fits: bool, condition: str) -> None:
        """Raises unless a field fits.

        Args:
            field: Its name.
            fits: Whether it does.
            condition: What was expected, as a phrase that follows "expected `field`".

        Raises:
            TokenWeightsError: If it does not.
        """
        if not fits:
            got = repr(getattr(self, field))
            raise invalid(self.kind, field, condition, got, "Change that field.")

    def require_number(
        self, *fields: str, least: float = -math.inf, most: float = math.inf
    ) -> None:
        """Raises unless fields are finite numbers of a range; None is left alone.

        Args:
            *fields: Their names.
            least: Smallest number that fits.
            most: Largest number that fits.

        Raises:
            TokenWeightsError: If one is not.
        """
        low, high = (f"{end:g}" if abs(end) < math.inf else None for end in (least, most))
        bound = {
            (False, False): "finite",
            (True, False): f">= {low} and finite",
            (False, True): f"<= {high} and finite",
            (True, True): f"in [{low}, {high}]",
        }[low is not None, high is not None]
        for field in fields:
            value = getattr(self, field)
            fits = value is None or (math.isfinite(value) and least <= value <= most)
            self.require(field, fits, bound)


def parts_of(part: Any) -> Iterator[Any]:
    """A part and all parts inside of it, the outer ones first."""
    if part is None:
        return
    yield part
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        for item in dataclasses.fields(part):
            value = getattr(part, item.name)
            for inner in value if isinstance(value, tuple) else (value,):
                if is_part(inner):
                    yield from parts_of(inner)


def is_part(value: Any) -> bool:
    """Whether a value is a signal, a rule or a condition."""
    return isinstance(value, Part) or (
        callable(value) and not isinstance(value, type) and dataclasses.is_dataclass(value)
    )


def mapped_parts(part: Any, change: Callable[[Any], Any]) -> Any:
    """The part with each part inside of it, and then itself, changed by a function."""
    if part is None:
        return None
    changes: dict[str, Any] = {}
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        for item in dataclasses.fields(part):
            value = getattr(part, item.name)
            if isinstance(value, tuple) and any(map(is_part, value)):
                new = tuple(mapped_parts(v, change) if is_part(v) else v for v in value)
            else:
                new = mapped_parts(value, change) if is_part(value) else value
            if new is not value and new != value:
                changes[item.name] = new
        part = dataclasses.replace(part, **changes) if changes else part
    return change(part)


def columns_of(part: Any) -> tuple[str, ...]:
    """Names of the columns that a part and all parts inside of it read.

    Raises:
        TokenWeightsError: If a part names a column that there is not.
    """
    names: dict[str, None] = {}
    for each in parts_of(part):
        for name in getattr(each, "columns", ()):
            if name not in COLUMNS:
                raise unknown(label(each), "columns", name, COLUMNS)
            names[name] = None
    return tuple(names)


def reader(part: Any, column: str) -> Any:
    """The part inside of a part that reads a column."""
    inner = [each for each in parts_of(part) if column in columns_of(each)]
    return inner[-1] if inner else part


def require_numbers(part: Any, batch: RolloutBatch, group: dist.ProcessGroup | None) -> None:
    """Raises unless responses have the numbers that a part and all parts inside of it need.

    Args:
        part: A rule.
        batch: This rank's rows.
        group: The ranks that share the batch, if the batch does not name them.

    Raises:
        TokenWeightsError: If prompts have no numbers, or samples of a batch of several ranks.
    """
    shared = is_shared(group) or is_shared(batch.group)
    conditions = {"prompt_ids": "given for the scope 'prompt'"}
    hints = {"prompt_ids": "a number for each response, equal for responses to one prompt."}
    if shared:
        conditions["sample_ids"] = "given where several ranks share the batch"
        hints["sample_ids"] = "for each response a number that no other of the run has."
    for each in parts_of(part):
        for name in each.numbers if isinstance(each, Part) else ():
            if name in conditions and getattr(batch, name) is None:
                hint = f"Pass `RolloutBatch({name}=...)`, {hints[name]}"
                raise invalid(each.kind, name, conditions[name], None, hint)


def label(part: Any) -> str:
    """What a part is called in messages: its kind, or the name of its class or function."""
    kind = getattr(part, "kind", None)
    return kind if isinstance(kind, str) else getattr(part, "__name__", type(part).__name__)


def part_lines(part: Any) -> list[str]:
    """What a part does, in lines; of a part of a user's the first line of its docstring."""
    if isinstance(part, Part):
        return part.lines()
    meant = part if inspect.isfunction(part) else type(part)
    own = inspect.getdoc(meant) or ""
    first = own.partition("\n")[0]
    generated = first.startswith(f"{label(part)}(")  # what a dataclass without a docstring has
    shown = repr(part) if dataclasses.is_dataclass(part) else label(part)
    return [shown] if generated or not first else [shown, first]


def decimal(value: float) -> str:
    """A number as it was written: 15 digits, which every decimal of that length survives."""
    return f"{value:.15g}"


def unknown(function: str, what: str, value: Any, known: Sequence[str]) -> TokenWeightsError:
    """An error for a value that is none of the known ones, naming the nearest of them."""
    near = nearest(value, known)
    hint = f"Did you mean {near!r}?" if near else f"Choose one of {', '.join(known)}."
    return invalid(function, what, "known", repr(value), hint)


def _check_type(kind: str, field: str, annotation: Any, value: Any) -> None:
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            raise unknown(kind, field, value, get_args(annotation))
    elif not _fits(value, annotation):
        name = annotation.__name__ if isinstance(annotation, type) else annotation
        raise invalid(kind, field, f"of type {name}", repr(value), "Change that field.")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of a field's type, every item of a tuple included."""
    if get_origin(annotation) is UnionType:
        return any(_fits(value, choice) for choice in get_args(annotation))
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(annotation)[0]) for v in value)
    if annotation in (int, float):
        kinds = (int,) if annotation is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if annotation in (Signal, Rule):
        return callable(value) and not isinstance(value, type)
    return isinstance(value, annotation)
