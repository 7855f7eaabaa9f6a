"""Signals and rules as plain values: a mapping of a kind and its fields, for JSON and YAML.

The kind of a part of this library is one word. The kind of your own is where it can be imported
from, `"package.module:Name"`.
"""

import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import Any

from tokenweights._errors import TokenWeightsError, invalid, nearest
from tokenweights.recipes import combine, field, preplan, rules, signals
from tokenweights.recipes.attention import AttentionEntropy
from tokenweights.recipes.backward import BackwardDistance, FutureInfluence
from tokenweights.recipes.parts import Part, Rule, Signal, is_part, unknown

SIGNALS: tuple[type[Part], ...] = (
    AttentionEntropy,
    BackwardDistance,
    FutureInfluence,
    *signals.ALL,
    *combine.SIGNALS,
)
RULES: tuple[type[Part], ...] = (*rules.ALL, *field.ALL, *preplan.ALL, *combine.RULES)
CONDITIONS: tuple[type[Part], ...] = combine.CONDITIONS

_BY_ROLE = {
    "signal": {made.kind: made for made in SIGNALS},
    "rule": {made.kind: made for made in RULES},
}
_ALL = {made.kind: made for made in (*SIGNALS, *RULES, *CONDITIONS)}


def part_from(value: Any, *, role: str = "part", base: Any = None) -> Any:
    """A part from its kind, from a mapping of its kind and fields, or as it is.

    Args:
        value: A part; a kind; a mapping; anything else is returned unchanged. `"none"` is None.
        role: `"signal"` or `"rule"`, which kinds have to be of; any other for a field's value.
        base: A part that one of the same kind starts from.

    Returns:
        The part.

    Raises:
        TokenWeightsError: If the kind or a field is unknown, or cannot be imported.
    """
    if isinstance(value, Mapping):
        if "kind" not in value:
            hint = "Say which part it is: `{'kind': 'top', 'fraction': 0.2}`."
            raise invalid("recipe", role, "a mapping with a kind", dict(value), hint)
        fields = {key: part_from(item) for key, item in value.items() if key != "kind"}
        return _made(_class_of(value["kind"], role), fields, role, base)
    if isinstance(value, list | tuple):
        return tuple(part_from(item) for item in value)
    if isinstance(value, str) and role in _BY_ROLE:
        if value == "none" and role == "signal":
            return None
        return _made(_class_of(value, role), {}, role, base)
    return value


def changed_part(part: Any, fields: Mapping[str, Any]) -> Any:
    """A part with some of its fields changed.

    Args:
        part: A dataclass.
        fields: Values by the names of fields, with parts as `part_from` takes them.

    Returns:
        The part.

    Raises:
        TokenWeightsError: If a field is unknown or its value does not fit.
    """
    made = {key: part_from(value, role=key) for key, value in fields.items()}
    return _made(type(part), made, "part", part)


def part_values(part: Any) -> Any:
    """A part as a mapping of its kind and its fields, of plain values only; see `part_from`.

    Args:
        part: A part, None, or the value of a field.

    Returns:
        Numbers, strings, booleans, None, lists and mappings.

    Raises:
        TokenWeightsError: If it cannot be written that way.
    """
    if part is None or isinstance(part, bool | int | str):
        return part
    if isinstance(part, float) and math.isfinite(part):
        return part
    if isinstance(part, tuple | list):
        return [part_values(item) for item in part]
    if not callable(part):
        hint = "A recipe as text holds numbers, words and parts."
        raise invalid("Recipe.to_dict", "field", "a plain value", repr(part), hint)
    values = {"kind": kind_of(part)}
    if dataclasses.is_dataclass(part):
        names = [item.name for item in dataclasses.fields(part) if item.init]
        values |= {name: part_values(getattr(part, name)) for name in names}
    return values


def kind_of(part: Any) -> str:
    """The word for a part of this library; `"package.module:Name"` for one of yours.

    Args:
        part: A signal, a rule or a condition.

    Returns:
        Its kind.

    Raises:
        TokenWeightsError: If there is no import that leads to it.
    """
    if type(part) in _ALL.values():
        return type(part).kind
    meant = part if hasattr(part, "__qualname__") else type(part)
    path = f"{meant.__module__}:{meant.__qualname__}"
    if "<" in path or meant.__module__ == "__main__":
        hint = "Define it at the top of a module, and import it from there."
        raise invalid("Recipe.to_dict", "part", "one that can be imported", path, hint)
    return path


def _class_of(kind: Any, role: str) -> Any:
    if not isinstance(kind, str):
        raise invalid(
            "recipe", "kind", "a word", repr(kind), "Write `top` or `package.module:Name`."
        )
    if ":" in kind:
        return _imported(kind)
    known = _BY_ROLE.get(role, _ALL)
    if kind not in known:
        word = role if role in _BY_ROLE else "kind"
        raise unknown("recipe", word, kind, tuple(known))
    return known[kind]


def _imported(path: str) -> Any:
    """What an import path names."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        hint = "Is it installed, or its folder on PYTHONPATH?"
        got = f"{path!r} ({type(error).__name__}: {error})"
        raise invalid("recipe", "kind", "a module that can be imported", got, hint) from error
    found: Any = module
    for step in name.split("."):
        if not hasattr(found, step):
            near = nearest(step, [each for each in vars(found) if not each.startswith("_")])
            hint = f"Did you mean {near!r}?" if near else "It is `package.module:Name`."
            raise invalid("recipe", "kind", f"a name in {module_name}", repr(path), hint)
        found = getattr(found, step)
    if not callable(found):
        raise invalid("recipe", "kind", "a signal or a rule", repr(found), "Name a class.")
    return found


def _made(made: Any, fields: dict[str, Any], role: str, base: Any = None) -> Any:
    if not isinstance(made, type):  # a function is a part as it is
        if fields:
            hint = "A function has none; make it a dataclass with a `__call__`."
            raise invalid("recipe", role, "without fields", sorted(fields), hint)
        return made
    if dataclasses.is_dataclass(made):
        known = [item.name for item in dataclasses.fields(made) if item.init]
        for key in fields:
            if key not in known:
                raise unknown(getattr(made, "kind", made.__name__), "key", key, known)
        fields = {
            item.name: _nested(fields[item.name], item.type)
            for item in dataclasses.fields(made)
            if item.name in fields
        }
    try:
        return dataclasses.replace(base, **fields) if type(base) is made else made(**fields)
    except TokenWeightsError:
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        hint = "Look at its fields."
        raise invalid("recipe", role, f"a {made.__name__} of {fields}", got, hint) from error


def _nested(value: Any, annotation: Any) -> Any:
    """A field's value, where a word may stand for a part."""
    if isinstance(value, str) and annotation in (Signal, Rule):
        return part_from(value, role="signal" if annotation is Signal else "rule")
    if isinstance(value, tuple) and not is_part(value) and annotation is not None:
        inner = getattr(annotation, "__args__", (None,))[0]
        return tuple(_nested(item, inner) for item in value)
    return value
