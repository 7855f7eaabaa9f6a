"""Recipes by name: the paper's runs, and rules of the field."""

from collections.abc import Mapping
from typing import Any, Literal

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.recipes import field_named
from tokenweights.recipes.attention import AttentionEntropy
from tokenweights.recipes.parts import Rule, Signal, unknown
from tokenweights.recipes.published import NO_WEIGHTS
from tokenweights.recipes.recipe import Recipe, recipe_from
from tokenweights.recipes.rules import (
    Back,
    Bernoulli,
    Bottom,
    EndpointWeights,
    Front,
    PositionMatched,
    Random,
    Top,
    TypeMatched,
    Uniform,
)
from tokenweights.recipes.signals import LossMagnitude, PredictiveEntropy


@typed
def recipe(name: str | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe by name, from a mapping, or as it is.

    Args:
        name: The name of a recipe; a mapping with such a `name` and what to change; or a mapping
            with a `rule`, as `Recipe.from_dict` takes it. A key that belongs to exactly one part of
            the recipe reaches it.

    Returns:
        The recipe.

    Raises:
        TokenWeightsError: If the name, a key or a value is unknown; the nearest valid one is named.

    Example:
        >>> recipe("anchor20").denominator
        'selected_tokens'
        >>> recipe({"name": "low2high", "warmup_steps": 50}).rule.endpoints(25)
        Endpoints(low=0.5, high=0.5)
        >>> made = recipe({"rule": {"kind": "top", "scope": "batch"}, "signal": "surprisal"})
        >>> made.rule.fraction
        0.2
    """
    if isinstance(name, Recipe):
        return name
    values = {"name": name} if isinstance(name, str) else dict(name)
    label = values.get("name")
    named = _RECIPES.get(label) if isinstance(label, str) else None
    if named is not None or "rule" in values:
        return recipe_from(named, values)
    if isinstance(label, str) and label in NO_WEIGHTS:
        condition = "that weights on a rollout batch's advantages can carry"
        got = f"{label!r}: {NO_WEIGHTS[label]}"
        hint = "The guide on rules that are not weights shows what a loop of your own can do."
        raise invalid("recipe", "name", condition, got, hint)
    raise unknown("recipe", "name", label, recipe_names())


@typed
def recipe_names(*, source: Literal["paper", "field"] | None = None) -> tuple[str, ...]:
    """The names of the paper's runs, and after them those of rules of the field.

    Args:
        source: `"paper"` or `"field"` for the names of one; None for all.

    Returns:
        Names that `recipe` takes.

    Example:
        >>> recipe_names()[:4]
        ('full', 'random20', 'bernoulli20', 'anchor20')
        >>> len(recipe_names(source="paper"))
        22
    """
    recipes = {"paper": _PAPER, "field": field_named.RECIPES}
    return tuple(_RECIPES) if source is None else tuple(made.name for made in recipes[source])


def _hard(name: str, rule: Rule, signal: Signal | None = None) -> Recipe:
    # Hard masks divide by the selected tokens in the paper's main runs (Appendix B.8).
    return Recipe(name=name, rule=rule, signal=signal, denominator="selected_tokens")


def _soft(name: str, *, layers: tuple[int, ...] | None = None, **fields: Any) -> Recipe:
    signal = AttentionEntropy(layers=layers)
    return Recipe(name=name, signal=signal, rule=EndpointWeights(**fields))


_ATTENTION, _PREDICTIVE, _LOSS = AttentionEntropy(), PredictiveEntropy(), LossMagnitude()

_PAPER = (
    Recipe(name="full", rule=Uniform()),
    _hard("random20", Random()),
    _hard("bernoulli20", Bernoulli()),
    _hard("anchor20", Bottom(), _ATTENTION),
    _hard("explorer20", Top(), _ATTENTION),
    Recipe(name="anchor20_all_tokens", rule=Bottom(), signal=_ATTENTION),
    Recipe(name="explorer20_all_tokens", rule=Top(), signal=_ATTENTION),
    _soft("low2high"),
    _soft("low2high_layer8", layers=(8,)),
    _soft("low2high_layer20", layers=(20,)),
    _soft("low2high_layer31", layers=(31,)),
    _soft("high2low", low=(0.0, 1.0), high=(1.0, 0.0)),
    _soft("static_anchor", schedule="constant"),
    _soft("static_explorer", low=(0.0, 0.0), high=(1.0, 1.0), schedule="constant"),
    _hard("front20", Front()),
    _hard("back20", Back()),
    _hard("predictive_low20", Bottom(), _PREDICTIVE),
    _hard("predictive_high20", Top(), _PREDICTIVE),
    _hard("loss_low20", Bottom(), _LOSS),
    _hard("loss_high20", Top(), _LOSS),
    _hard("type_matched20", TypeMatched(), _ATTENTION),
    _hard("position_matched20", PositionMatched(), _ATTENTION),
)
_RECIPES: dict[str, Recipe] = {made.name: made for made in (*_PAPER, *field_named.RECIPES)}
