"""The paper's runs by name."""

from collections.abc import Mapping
from typing import Any

from tokenweights._typing import typed
from tokenweights.recipes.record import Recipe, Rule, Signal, require_known_keys, unknown


@typed
def recipe(name: str | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe by name, from a mapping of fields, or as it is.

    Args:
        name: The name of a recipe of the paper; a mapping with such a `name` and the fields to
            change; or a mapping with a `rule`, as `Recipe.from_dict` takes it.

    Returns:
        The recipe.

    Raises:
        TokenWeightsError: If the name, a key or a value is unknown; the nearest valid one is named.

    Example:
        >>> recipe("anchor20").denominator
        'selected_tokens'
        >>> recipe({"name": "low2high", "warmup_steps": 50}).endpoints(25)
        Endpoints(low=0.5, high=0.5)
    """
    if isinstance(name, Recipe):
        return name
    values = {"name": name} if isinstance(name, str) else dict(name)
    require_known_keys(values)
    label = values.get("name")
    named = _RECIPES.get(label) if isinstance(label, str) else None
    if named is not None:
        return Recipe.from_dict(named.to_dict() | values)
    if "rule" not in values:
        raise unknown("name", label, recipe_names())
    return Recipe.from_dict(values)


def recipe_names() -> tuple[str, ...]:
    """The names of the paper's runs.

    Returns:
        Every name that `recipe` takes.

    Example:
        >>> recipe_names()[:4]
        ('full', 'random20', 'bernoulli20', 'anchor20')
    """
    return tuple(_RECIPES)


def _hard(name: str, rule: Rule, signal: Signal = "none", **fields: Any) -> Recipe:
    # Hard masks divide by the selected tokens in the paper's main runs (Appendix B.8).
    return Recipe(name=name, rule=rule, signal=signal, denominator="selected_tokens", **fields)


_ATTENTION, _PREDICTIVE, _LOSS = "attention_entropy", "predictive_entropy", "loss_magnitude"

_RECIPES: dict[str, Recipe] = {
    made.name: made
    for made in (
        Recipe(name="full", rule="uniform", signal="none"),
        _hard("random20", "random"),
        _hard("bernoulli20", "bernoulli"),
        _hard("anchor20", "bottom", _ATTENTION),
        _hard("explorer20", "top", _ATTENTION),
        Recipe(name="anchor20_all_tokens", rule="bottom"),
        Recipe(name="explorer20_all_tokens", rule="top"),
        Recipe(name="low2high"),
        Recipe(name="low2high_layer8", layers=(8,)),
        Recipe(name="low2high_layer20", layers=(20,)),
        Recipe(name="low2high_layer31", layers=(31,)),
        Recipe(name="high2low", low=(0.0, 1.0), high=(1.0, 0.0)),
        Recipe(name="static_anchor", schedule="constant"),
        Recipe(name="static_explorer", low=(0.0, 0.0), high=(1.0, 1.0), schedule="constant"),
        _hard("front20", "front"),
        _hard("back20", "back"),
        _hard("predictive_low20", "bottom", _PREDICTIVE),
        _hard("predictive_high20", "top", _PREDICTIVE),
        _hard("loss_low20", "bottom", _LOSS),
        _hard("loss_high20", "top", _LOSS),
        _hard("type_matched20", "type_matched", _ATTENTION),
        _hard("position_matched20", "position_matched", _ATTENTION),
    )
}
