"""Loose keys: fields of a recipe's parts that stand beside the parts in a mapping."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tokenweights._errors import invalid
from tokenweights.recipes.kinds import changed_part
from tokenweights.recipes.parts import is_part, label, mapped_parts, parts_of, unknown


def placed_keys(
    rule: Any, signal: Any, loose: Mapping[str, Any], *, own: Sequence[str]
) -> tuple[Any, Any]:
    """A rule and a signal with each loose key in the one part that has it.

    Whose a key is depends on the parts as they are given, before any of them is changed.

    Args:
        rule: The rule.
        signal: The signal, or None.
        loose: The keys, and the values of fields.
        own: Names of the recipe's own fields, for the message of an error.

    Returns:
        Both.

    Raises:
        TokenWeightsError: If a key is that of no part or of several, or of a part that the value of
            another key replaces; or a value does not fit.
    """
    parts = [part for whole in (rule, signal) for part in parts_of(whole)]
    having = {key: [part for part in parts if key in _field_names(part)] for key in loose}
    for key, owners in having.items():
        if not owners:
            known = [name for part in parts if is_part(part) for name in _field_names(part)]
            raise unknown("recipe", "key", key, [*own, *dict.fromkeys(known)])
        if len(owners) > 1:
            kinds = [label(part) for part in owners]
            hint = "Give the part as a mapping of its own, with its kind."
            raise invalid("recipe", key, "of exactly one part", f"one of {kinds}", hint)
    # A part has a key of its own only where it stands once, so it is told from others by identity:
    # it keeps that as long as those around it are changed first.
    for part in parts:
        mine = {key: loose[key] for key, (owner,) in having.items() if owner is part}
        if not mine:
            continue
        placed = _Placed(part, mine)
        rule, signal = mapped_parts(rule, placed), mapped_parts(signal, placed)
        if not placed.found:
            key, others = next(iter(mine)), [f"`{each}`" for each in loose if each not in mine]
            hint = f"Write it into the part that {' or '.join(others)} puts there."
            raise invalid("recipe", key, "of a part that stays", f"one of {label(part)!r}", hint)
    return rule, signal


class _Placed:
    """The change of one part, wherever it stands, that remembers whether it was there."""

    def __init__(self, part: Any, fields: Mapping[str, Any]) -> None:
        self._part, self._fields, self.found = part, fields, False

    def __call__(self, part: Any) -> Any:
        if part is not self._part:
            return part
        self.found = True
        return changed_part(part, self._fields)


def _field_names(part: Any) -> list[str]:
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return []
    return [item.name for item in dataclasses.fields(part) if item.init]
