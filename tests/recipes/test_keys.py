"""Loose keys: one that belongs to exactly one part of a recipe reaches it, whatever else does."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Literal, get_args, get_origin

import pytest

import tokenweights as tw
from tokenweights import TokenWeightsError
from tokenweights.recipes import Rule, Signal, combine, rules, signals
from tokenweights.recipes.parts import is_part

NAMES = tw.recipe_names()
OWN = [item.name for item in dataclasses.fields(tw.Recipe)]
# Values of a field, of which one at least differs from the one that it has.
NUMBERS = (0.5, 0.25, 2.0, 3, 7, 1, -0.125)
OF_PARTS = {
    Rule: ({"kind": "front", "fraction": 0.125}, "back"),
    Signal: ({"kind": "position_sigmoid", "steepness": 9.0}, "log_prob"),
}
CONDITION = {"kind": "steps", "start": 2, "stop": 5}


def fields_of(part, path):
    """Every field of a part and of the parts inside of it, as its path and its type."""
    for item in dataclasses.fields(part):
        yield (*path, item.name), item.type
        value = getattr(part, item.name)
        held = enumerate(value) if isinstance(value, tuple) else [(None, value)]
        for place, inner in held:
            if is_part(inner):
                below = (*path, item.name) if place is None else (*path, item.name, place)
                yield from fields_of(inner, below)


def at(made, path):
    for name in path:
        made = made[name] if isinstance(name, int) else getattr(made, name)
    return made


def candidates(annotation):
    if annotation in OF_PARTS:
        return OF_PARTS[annotation]
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    choices = get_args(annotation) or (annotation,)
    if combine.Steps in choices:
        return (CONDITION,)
    return (*NUMBERS, *(((1, 2), (0.25, 0.5)) if tuple in map(get_origin, choices) else ()))


def changes_of(name):
    """Paths of the keys that belong to exactly one part, and a value that each of them takes."""
    made = tw.recipe(name)
    paths = [
        (path, annotation)
        for role in ("rule", "signal")
        if getattr(made, role) is not None
        for path, annotation in fields_of(getattr(made, role), (role,))
    ]
    keys = [path[-1] for path, _ in paths]
    found = {}
    for path, annotation in paths:
        key, before = path[-1], at(made, path)
        if keys.count(key) > 1 or key in OWN:
            continue
        for value in candidates(annotation):
            try:
                after = at(tw.recipe({"name": name, key: value}), path)
            except TokenWeightsError:
                continue
            if after != before:
                found[path] = value, after
                break
    return found


def test_values_of_keys_are_found():
    found = [path[-1] for name in NAMES for path in changes_of(name)]
    assert len(found) > 200
    assert {"boost", "otherwise", "when", "distance", "layers", "chosen", "schedule"} <= {*found}


@pytest.mark.parametrize("name", NAMES)
def test_both_of_two_keys_reach_their_parts(name):
    """In either order, or are refused together: none is ever dropped."""
    found = changes_of(name)
    for one, other in itertools.permutations(found, 2):
        keys = {path[-1]: found[path][0] for path in (one, other)}
        try:
            made = tw.recipe({"name": name, **keys})
        except TokenWeightsError as error:
            inside = one[: len(other)] == other or other[: len(one)] == one
            assert ("of a part that stays" in str(error)) == inside, (keys, str(error))
            continue
        for path in (one, other):
            assert at(made, path) == found[path][1], (keys, path)


def test_an_outer_and_an_inner_key():
    made = tw.recipe({"name": "preplan_anchor40", "bound": 20, "boost": 2.0})
    assert (made.rule.positive.boost, made.rule.positive.distance.bound) == (2.0, 20)
    bottom = rules.Bottom(fraction=0.1)
    gate = {"kind": "gate", "rule": "top", "when": {"kind": "steps"}}
    values = {"rule": gate, "signal": "surprisal", "fraction": 0.5}
    made = tw.recipe({**values, "otherwise": {"kind": "bottom", "fraction": 0.1}})
    assert (made.rule.rule.fraction, made.rule.otherwise) == (0.5, bottom)
    made = tw.recipe({"name": "surprisal_boost10", "below": 0.5, "otherwise": "bottom"})
    assert (made.rule.when.below, made.rule.otherwise) == (0.5, rules.Bottom())


def test_a_key_of_a_part_that_another_key_replaces_is_refused():
    values = {"name": "surprisal_boost10", "when": {"kind": "steps"}, "below": 0.5}
    with pytest.raises(TokenWeightsError) as error:
        tw.recipe(values)
    assert "`recipe`: expected `below` of a part that stays, got one of 'batch_mean'" in str(
        error.value
    )
    assert "`when`" in str(error.value)


@dataclass(frozen=True)
class Both:
    """A user's rule of two others."""

    first: Rule = rules.Top()  # noqa: RUF009 - a frozen record
    second: Rule = rules.Front(fraction=0.5)  # noqa: RUF009
    share: float = 0.5
    made: int = dataclasses.field(default=3, init=False)

    def __call__(self, scores, batch, *, step, group=None):
        first, second = (each(scores, batch, step=step) for each in (self.first, self.second))
        return self.share * first + (1 - self.share) * second


def test_parts_of_a_users_have_loose_keys_too():
    values = {"rule": f"{__name__}:Both", "signal": "position", "share": 0.25, "scope": "batch"}
    made = tw.recipe(values)
    assert made.rule == Both(first=rules.Top(scope="batch"), share=0.25)
    with pytest.raises(TokenWeightsError, match="`key` known, got 'made'"):
        tw.recipe({**values, "made": 4})


def test_parts_that_are_equal_are_told_apart():
    """The same object in two places has no key of its own, and stays as it is."""
    on = combine.On(rule=rules.Front(), signal=signals.Surprisal())
    rule = combine.Product(rules=(on, on, rules.Top(fraction=0.5)))
    made = tw.recipe({"rule": rule, "signal": "position", "sign": "positive", "inside": 3.0})
    assert made.rule.rules == (on, on, rules.Top(fraction=0.5, sign="positive", inside=3.0))
    with pytest.raises(TokenWeightsError, match="of exactly one part"):
        tw.recipe({"rule": rule, "signal": "position", "fraction": 0.1})
