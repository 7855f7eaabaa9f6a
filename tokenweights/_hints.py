"""What a type hint takes: whether a value fits it, what a near miss means, and both in words.

Tensors, numbers, choices and collections are a `Condition` of their own here, since something other
than what is asked may be plainly meant, and since every item counts. beartype judges the rest.
"""

import functools
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import torch
from beartype import BeartypeConf
from beartype.door import is_bearable
from jaxtyping import AbstractArray, Shaped
from torch import Tensor

from tokenweights._errors import nearest

Sizes = dict[str, int]

# An `int` stands where a `float` is annotated, as Python's own typing has it.
_NUMERIC_TOWER = BeartypeConf(is_pep484_tower=True)

NUMBERS = {bool: "True or False", int: "an integer", float: "a number"}
# The kinds of tensor: in words, and the method of a tensor that makes one of another.
TENSORS = {
    "Bool": ("bool ", "bool"),
    "Float": ("float ", "float"),
    "Int": ("integer ", "long"),
    "Shaped": ("", ""),
}


class Condition:
    """What one hint takes."""

    axis_names: frozenset[str] = frozenset()

    def fits(self, value: Any) -> bool:
        """Whether a value is taken as it is."""
        raise NotImplementedError

    def meant(self, value: Any) -> Any:
        """What a value that does not fit plainly means, or the value itself."""
        return value

    def words(self, sizes: Sizes) -> str:
        """The condition as a noun phrase, with the sizes of the axes that are known."""
        raise NotImplementedError

    def nearness(self, value: Any) -> int:
        """How much a value that does not fit looks like one that was to fit here."""
        return 0

    def fault(self, value: Any, name: str) -> tuple[str, str]:
        """What a value that does not fit is, and what to do about it.

        The second is empty where only the sizes of axes are wrong, of which others know more.
        """
        return shown(value), f"Pass {self.words({})}."

    def axes(self, value: Any) -> Sizes:
        """The sizes that a value which fits gives to named axes."""
        return {}

    @property
    def traced(self) -> "Condition | None":
        """The part of the condition whose `meant` `torch.compile` can and has to trace."""
        return None


class Anything(Condition):
    """Of a hint that rules nothing out."""

    def fits(self, value: Any) -> bool:
        return True

    def words(self, sizes: Sizes) -> str:
        return "anything"


class Judged(Condition):
    """What beartype makes of a hint."""

    def __init__(self, hint: Any, words: str):
        self._hint, self._words = hint, words

    def fits(self, value: Any) -> bool:
        return is_bearable(value, self._hint, conf=_NUMERIC_TOWER)

    def words(self, sizes: Sizes) -> str:
        return self._words


class ForwardReference(Condition):
    """What a hint in quotation marks stands for, once its names exist; anything until then."""

    def __init__(self, hint: str, namespace: dict[str, Any]):
        self.hint, self.namespace = hint, namespace

    def fits(self, value: Any) -> bool:
        return self._condition.fits(value)

    def words(self, sizes: Sizes) -> str:
        return self._condition.words(sizes)

    @functools.cached_property
    def _condition(self) -> Condition:
        try:
            return condition_of(eval(self.hint, self.namespace), self.namespace)
        except NameError:  # imported for the type checker only
            return Anything()


class Number(Condition):
    """A Python number. Scalars of NumPy and tensors without axes mean the number they hold.

    It is the very number, so that a score is never above or below itself as a threshold. Only of a
    share of a count the decimal is meant that was rounded to it: 0.2 of five tokens is one, and
    what float32 makes of 0.2 would be two.
    """

    def __init__(self, kind: type, *, share: bool = False):
        self.kind, self.share = kind, share
        self.kinds = (int, float) if kind is float else (kind,)  # an int stands for a float

    def fits(self, value: Any) -> bool:
        return isinstance(value, self.kinds)

    def meant(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            return value  # its gradient would be lost without a word
        if not _is_array(value) or value.ndim:
            return value
        return _as_written(value) if self.share else value.item()

    def words(self, sizes: Sizes) -> str:
        return NUMBERS[self.kind]

    def nearness(self, value: Any) -> int:
        return int(not (_is_array(value) and value.ndim))

    def fault(self, value: Any, name: str) -> tuple[str, str]:
        if isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad:
            return (
                f"{shown(value)} that requires a gradient",
                f"No gradient flows through a Python number: pass `{name}.detach()`.",
            )
        return super().fault(value, name)


class Choice(Condition):
    """One of a few words."""

    def __init__(self, choices: tuple[str, ...]):
        self.choices = choices

    def fits(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.choices

    def words(self, sizes: Sizes) -> str:
        *most, last = map(repr, self.choices)
        return f"one of {', '.join(most)} or {last}" if most else last

    def nearness(self, value: Any) -> int:
        return 2 * isinstance(value, str)

    def fault(self, value: Any, name: str) -> tuple[str, str]:
        near = nearest(value, self.choices)
        return shown(value), f"Did you mean {near!r}?" if near else "Pass one of them."


class TensorOf(Condition):
    """A tensor of a kind of dtype, with named axes.

    Arrays of NumPy mean the tensor that shares their memory. Integers mean the mask where they are
    0 and 1 only, counts where a number without axes is asked, and are no scores.
    """

    def __init__(self, hint: type[AbstractArray]):
        self.hint = hint
        self.kind = hint.dtype.__name__
        self.names = hint.dim_str.split()
        self.axis_names = frozenset(name.lstrip("#") for name in self.names)
        self._adjective, self._remedy = TENSORS[self.kind]
        self._any_shape = hint.dtype[hint.array_type, "..."]

    def fits(self, value: Any) -> bool:
        return isinstance(value, self.hint)

    def meant(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            value = value if torch.compiler.is_compiling() else _shared_tensor(value)
        if not isinstance(value, Tensor) or not _is_integer(value.dtype):
            return value
        if self.kind == "Bool":
            # What `torch.compile` traces cannot depend on values.
            return value != 0 if torch.compiler.is_compiling() or _is_zero_one(value) else value
        if self.kind == "Float" and not self.names and value.ndim == 0:
            return value.to(torch.float32 if value.device.type == "mps" else torch.float64)
        if self.kind == "Int" and value.dtype in (torch.uint8, torch.uint16, torch.uint32):
            return value.long()
        return value

    def words(self, sizes: Sizes) -> str:
        if self.names == ["..."]:
            return f"a {self._adjective}tensor"
        if not self.names:
            return f"a {self._adjective}tensor without axes"
        return f"a {self._adjective}tensor of shape ({', '.join(self._axis_words(sizes))})"

    def nearness(self, value: Any) -> int:
        if not _is_array(value):
            return 0
        value = self.meant(value)
        return 1 + 2 * isinstance(value, self._any_shape) + self._has_rank(value)

    def fault(self, value: Any, name: str) -> tuple[str, str]:
        meant = self.meant(value)
        got = shown(value)
        if not isinstance(meant, Tensor):
            example = f", for example `torch.tensor({name})`"
            return got, f"Pass a tensor{example if isinstance(value, list | tuple) else ''}."
        if not isinstance(meant, self._any_shape):
            if self.kind == "Bool" and _is_integer(meant.dtype):
                return f"{got} with values other than 0 and 1", f"Pass the mask, as `{name} != 0`."
            unit = ", if it holds 0 and 1 only" if self.kind == "Bool" else ""
            return got, f"Pass `{name}.{self._remedy}()`{unit}."
        if not self._has_rank(meant):
            axes = ", ".join(self._axis_words({}))
            return got, f"Give it the axes ({axes})." if axes else "Pass one number."
        return got, ""

    def axes(self, value: Any) -> Sizes:
        if not isinstance(value, Tensor) or not self._has_rank(value):
            return {}
        star = self._star
        last = len(self.names) - star - 1
        pairs = [
            *zip(self.names[:star], value.shape, strict=False),
            *zip(self.names[star + 1 :], value.shape[value.ndim - last :], strict=False),
        ]
        # A size of 1 on an axis that may be broadcast says nothing of the others.
        return {name.lstrip("#"): size for name, size in pairs if name[0] != "#" or size != 1}

    @property
    def traced(self) -> "Condition | None":
        return self

    @property
    def _star(self) -> int:
        """Where the axis stands that is any number of axes."""
        stars = (place for place, name in enumerate(self.names) if name[0] in "*.")
        return next(stars, len(self.names))

    def _has_rank(self, value: Any) -> bool:
        if self._star < len(self.names):
            return value.ndim >= len(self.names) - 1
        return value.ndim == len(self.names)

    def _axis_words(self, sizes: Sizes) -> list[str]:
        names = [(name.lstrip("#"), " or 1" if name[0] == "#" else "") for name in self.names]
        return [f"{name}={sizes[name]}{more}" if name in sizes else name for name, more in names]


class Items(Condition):
    """A collection with a condition on each of its items, every one of which is looked at.

    An iterator is taken as it is, since looking at its items would use them up.
    """

    def __init__(self, kind: type, item: Condition):
        self.kind, self.item = kind, item
        self.axis_names = item.axis_names

    def fits(self, value: Any) -> bool:
        if isinstance(value, str | bytes) or not isinstance(value, self.kind):
            return False
        return not isinstance(value, Collection) or all(map(self.item.fits, value))

    def meant(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            kind = self.kind if self.kind in (list, tuple) else type(value)
            return kind([self.item.meant(item) for item in value])
        if self._holds_numbers and _is_array(value) and value.ndim:
            lost = isinstance(value, Tensor) and value.requires_grad
            return value if lost else value.tolist()
        return value

    def words(self, sizes: Sizes) -> str:
        name = "tuple" if self.kind is tuple else "list" if self.kind is list else "sequence"
        return f"a {name} with every item {self.item.words(sizes)}"

    def nearness(self, value: Any) -> int:
        return 2 * (isinstance(value, Iterable) and not isinstance(value, str))

    def fault(self, value: Any, name: str) -> tuple[str, str]:
        if isinstance(value, str):
            return shown(value), f"Pass a list, such as `[{name}]`."
        if isinstance(value, Tensor) and value.requires_grad and self._holds_numbers:
            return (
                f"{shown(value)} that requires a gradient",
                f"No gradient flows through Python numbers: pass `{name}.detach()`.",
            )
        if isinstance(value, Sequence):
            for place, item in enumerate(value):
                if not (self.item.fits(item) or self.item.fits(self.item.meant(item))):
                    got, advice = self.item.fault(item, f"{name}[{place}]")
                    return f"{got} at index {place}", advice
        return shown(value), "Pass a list."

    def axes(self, value: Any) -> Sizes:
        return self.item.axes(value[0]) if isinstance(value, Sequence) and len(value) else {}

    @property
    def traced(self) -> "Condition | None":
        return self if self.item.traced is self.item else None

    @property
    def _holds_numbers(self) -> bool:
        item = self.item
        return isinstance(item, Number) or (isinstance(item, Items) and item._holds_numbers)


class Entries(Condition):
    """A mapping with a condition on each of its keys and values."""

    def __init__(self, kind: type, key: Condition, value: Condition):
        self.kind, self.key, self.value = kind, key, value

    def fits(self, value: Any) -> bool:
        return (
            isinstance(value, self.kind)
            and all(map(self.key.fits, value))
            and all(map(self.value.fits, value.values()))
        )

    def meant(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {self.key.meant(key): self.value.meant(item) for key, item in value.items()}

    def words(self, sizes: Sizes) -> str:
        words = f"a mapping with every key {self.key.words(sizes)}"
        if isinstance(self.value, Anything):
            return words
        return f"{words} and every value {self.value.words(sizes)}"

    def nearness(self, value: Any) -> int:
        return 2 * isinstance(value, Mapping)

    def fault(self, value: Any, name: str) -> tuple[str, str]:
        if not isinstance(value, Mapping):
            return shown(value), "Pass a dict."
        for key, item in value.items():
            if not (self.key.fits(key) or self.key.fits(self.key.meant(key))):
                got, advice = self.key.fault(key, "key")
                return f"the key {got}", advice
            if not (self.value.fits(item) or self.value.fits(self.value.meant(item))):
                got, advice = self.value.fault(item, f"{name}[{key!r}]")
                return f"{got} under the key {key!r}", advice
        return super().fault(value, name)


class Either(Condition):
    """One of several conditions."""

    def __init__(self, options: tuple[Condition, ...]):
        self.options = options
        self.axis_names = frozenset().union(*(option.axis_names for option in options))

    def fits(self, value: Any) -> bool:
        return any(option.fits(value) for option in self.options)

    def meant(self, value: Any) -> Any:
        every = (option.meant(value) for option in self.options)
        return next((meant for meant in every if meant is not value and self.fits(meant)), value)

    def words(self, sizes: Sizes) -> str:
        *most, last = (option.words(sizes) for option in self.options)
        return f"{', '.join(most)} or {last}"

    def nearness(self, value: Any) -> int:
        return self._nearest(value).nearness(value)

    def fault(self, value: Any, name: str) -> tuple[str, str]:
        return self._nearest(value).fault(value, name)

    def axes(self, value: Any) -> Sizes:
        return next((option.axes(value) for option in self.options if option.fits(value)), {})

    @property
    def traced(self) -> "Condition | None":
        traced = [option.traced for option in self.options if option.traced]
        return traced[0] if len(traced) == 1 else None  # of two, only a check could choose

    def _nearest(self, value: Any) -> Condition:
        return max(self.options, key=lambda option: option.nearness(value))


def condition_of(hint: Any, namespace: dict[str, Any], *, share: bool = False) -> Condition:
    """The condition that a hint stands for.

    Args:
        hint: A type hint.
        namespace: Where the names of a hint in quotation marks are to be found.
        share: Whether a number is a share of a count; see `Number`.

    Returns:
        The condition.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any or hint is object or isinstance(hint, TypeVar):
        return Anything()
    if isinstance(hint, str):
        return ForwardReference(hint, namespace)
    if hint is None or hint is NoneType:
        return Judged(None, "None")
    if origin in (Union, UnionType):
        return Either(tuple(condition_of(part, namespace, share=share) for part in parts))
    if origin is Literal and all(isinstance(part, str) for part in parts):
        return Choice(parts)
    if hint in NUMBERS:
        return Number(hint, share=share)
    if hint is Tensor:
        return TensorOf(Shaped[Tensor, "..."])  # pyright: ignore[reportArgumentType]
    if isinstance(hint, type) and origin is None and issubclass(hint, AbstractArray):
        return TensorOf(hint)
    if origin is tuple and (len(parts) != 2 or parts[1] is not ...):
        return Judged(hint, f"a tuple of {len(parts)}")
    kind: Any = origin or hint
    if kind is Callable:
        return Judged(hint, "a function")
    if parts and isinstance(kind, type) and issubclass(kind, Mapping):
        key, value = (condition_of(part, namespace) for part in parts)
        return Entries(kind, key, value)
    if parts and isinstance(kind, type) and issubclass(kind, Iterable):
        return Items(kind, condition_of(parts[0], namespace))
    if not isinstance(kind, type):
        return Judged(hint, f"`{hint}`")
    words = {"str": "a string", "PathLike": "a path"}
    return Judged(hint, words.get(kind.__name__, _named(kind.__name__)))


def _named(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOUaeio' else 'a'} `{name}`"


def shown(value: Any) -> str:
    """A value in a few words, however large it is."""
    if _is_array(value):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        dtype = str(value.dtype).removeprefix("torch.")
        article = "an" if dtype.startswith("int") else "a"
        axes = f"of shape {tuple(value.shape)}" if value.ndim else "without axes"
        return f"{article} {dtype} {kind} {axes}"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:60]}... of {len(text)} characters"
    length = f" of length {len(value)}" if isinstance(value, Collection) else ""
    return _named(type(value).__name__) + length


def _is_array(value: Any) -> bool:
    """Whether a value is a tensor, or an array or scalar of NumPy, which need not be there."""
    numpy = sys.modules.get("numpy")
    return isinstance(value, Tensor) or (
        numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))
    )


def _shared_tensor(value: Any) -> Any:
    """The tensor that shares an array's memory; a copy where torch cannot share it."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.ndarray):
        return value
    shareable = value.flags.writeable and min(value.strides, default=0) >= 0
    try:
        return torch.from_numpy(value if shareable else value.copy())
    except TypeError:
        return value  # torch has no such dtype


def _as_written(value: Any) -> int | float | complex | bool:
    """The number that a scalar holds; of a float the shortest decimal that rounds to it."""
    number = value.item()
    if isinstance(number, float):
        shorter = (float(f"{number:.{digits}g}") for digits in range(1, 10))
        scalar = torch.tensor if isinstance(value, Tensor) else sys.modules["numpy"].array
        return next((x for x in shorter if scalar(x, dtype=value.dtype) == number), number)
    return number


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _is_zero_one(value: Tensor) -> bool:
    return bool(((value == 0) | (value == 1)).all())
