"""A recipe in words and equations."""

from typing import TYPE_CHECKING

from tokenweights.recipes.parts import part_lines
from tokenweights.recipes.published import PUBLISHED
from tokenweights.recipes.rules import EndpointWeights

if TYPE_CHECKING:
    from tokenweights.recipes.recipe import Recipe

MEANS = {
    "all_tokens": "sum w l / T, all valid tokens  (Eq. 7, 25)",
    "selected_tokens": "sum w l / K, selected tokens  (Eq. 24)",
    "weight_sum": "sum w l / sum w  (Eq. 3, 17)",
}


def recipe_description(made: "Recipe") -> str:
    """A recipe as a few lines of text, with the equations it stands for.

    Args:
        made: The recipe; one that has the name of a rule of the field also says what its paper
            does.

    Returns:
        Lines without a trailing newline.
    """
    lines = [f"recipe   {made.name}"]
    if made.signal is not None:
        lines += _under("signal", part_lines(made.signal))
    lines += _under("rule", part_lines(made.rule))
    if isinstance(made.rule, EndpointWeights):
        lines.append(f"schedule {made.rule.schedule_line()}")
    if made.match_mass:
        lines.append("mass     weights rescaled to mean 1 in every rollout batch")
    lines.append(f"loss     {MEANS[made.denominator]}")
    published = PUBLISHED.get(made.name)
    if published is not None:
        lines += _under("source", [published.source, *published.notes])
        lines.append(f"scope    {published.own_scope}; published: {published.scope}")
        lines.append(f"when     rollout; published: {published.when}")
    return "\n".join(lines)


def _under(word: str, lines: list[str]) -> list[str]:
    return [f"{word if place == 0 else '':<8} {line}" for place, line in enumerate(lines)]
