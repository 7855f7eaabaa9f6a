"""What a trainer adapter asks of a recipe: one that it can serve, and weights of scores at hand."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.distributed import agreed
from tokenweights.recipes.batch import ON_DEMAND, RolloutBatch
from tokenweights.recipes.named import recipe
from tokenweights.recipes.parts import columns_of, label, parts_of, reader
from tokenweights.recipes.recipe import Recipe, WeightedRollout
from tokenweights.recipes.signals import SamplerRatio

SAME = (
    "At rollout time the ratio is 1, so |loss| is |advantage|, the same for every token of "
    "a response: there is nothing to rank. Use `predictive_low20` or `predictive_high20`."
)


@typed
def rollout_recipe(choice: str | Mapping[str, Any] | Recipe | None, *, caller: str) -> Recipe:
    """The recipe that a user chose for a trainer, if a rollout batch can serve it.

    Args:
        choice: As `recipe` takes it, or the JSON text of a mapping, as a command line has it.
        caller: What the user called, for the message of an error.

    Returns:
        The recipe.

    Raises:
        TokenWeightsError: If the choice is empty or unknown, or a part reads the tokens' loss.

    Example:
        >>> made = rollout_recipe('{"name": "low2high", "warmup_steps": 50}', caller="train")
        >>> made.rule.warmup_steps
        50
    """
    hint = 'Write `low2high`, or `{"name": "low2high", "warmup_steps": 50}`.'
    if not choice:
        raise invalid(caller, "recipe", "a recipe name or a dict", repr(choice), hint)
    if isinstance(choice, str) and choice.lstrip().startswith("{"):
        try:
            made = recipe(json.loads(choice))
        except json.JSONDecodeError as error:
            condition = "a name or valid JSON"
            raise invalid(caller, "recipe", condition, repr(choice), hint) from error
    else:
        made = recipe(choice)
    if "token_loss" in made.columns:
        condition = "with a signal other than loss_magnitude"
        raise invalid(caller, "recipe", condition, repr(made.name), SAME)
    return made


@typed
def require_columns(made: Recipe, given: Collection[str], *, caller: str) -> None:
    """Raises where a recipe reads a column that a trainer does not have; before workers start.

    Args:
        made: The recipe.
        given: Names of the columns that the trainer has, as it is set up.
        caller: What the user called, for the message of an error.

    Raises:
        TokenWeightsError: If a column is missing; it names the part that reads it.

    Returns:
        Nothing.

    Example:
        >>> made = recipe("probability_weighted")
        >>> require_columns(made, {"log_probs", "predictive_entropy"}, caller="train")
    """
    for name in made.columns:
        if name not in given:
            whole = made.signal if name in columns_of(made.signal) else made.rule
            raise invalid(
                caller,
                "recipe",
                f"that reads columns this trainer has ({', '.join(sorted(given))})",
                f"{made.name!r}, whose {label(reader(whole, name))!r} reads `{name}`, "
                f"the {ON_DEMAND.get(name)}",
                "Choose another recipe, or another setting of the trainer.",
            )


@typed
def corrects_sampler(made: Recipe) -> bool:
    """Whether a recipe multiplies by the ratio of trainer to sampler, as some trainers do too.

    Args:
        made: The recipe.

    Returns:
        Whether one of its parts is `signals.SamplerRatio`.

    Example:
        >>> corrects_sampler(recipe("sampler_ratio_band")), corrects_sampler(recipe("low2high"))
        (True, False)
    """
    parts = (*parts_of(made.signal), *parts_of(made.rule))
    return any(isinstance(part, SamplerRatio) for part in parts)


@agreed
@typed
def weighted_rollout(
    recipe: Recipe,
    scores: Float[Tensor, "batch token"] | None,
    mask: Bool[Tensor, "batch token"],
    *,
    step: int,
    sample_ids: Int[Tensor, " batch"] | None = None,
    token_groups: Int[Tensor, "batch token"] | None = None,
    group: dist.ProcessGroup | None = None,
) -> WeightedRollout:
    """Weights, scale and metrics from scores at hand: of a recipe that reads nothing else.

    `Recipe.weighted` does the same with a `RolloutBatch`, for every recipe.

    Args:
        recipe: The recipe.
        scores: This rank's scores, or None if the recipe needs none.
        mask: True for valid response tokens.
        step: Training step, for the schedule.
        sample_ids: As in `Recipe.token_weights`.
        token_groups: As in `Recipe.token_weights`.
        group: The ranks that share the rollout batch. All of them have to call.

    Returns:
        The record.

    Raises:
        TokenWeightsError: As `Recipe.token_weights`.

    Example:
        >>> import torch
        >>> import tokenweights as tw
        >>> mask = torch.ones(1, 5, dtype=torch.bool)
        >>> scores = torch.tensor([[0.1, 0.5, 0.2, 0.4, 0.3]])
        >>> rollout = weighted_rollout(tw.recipe("anchor20"), scores, mask, step=0)
        >>> rollout.weights, float(rollout.scale), rollout.metrics["anchor_share"]
        (tensor([[1., 0., 0., 0., 0.]]), 5.0, 1.0)
    """
    recipe._require_scores("weighted_rollout", scores, mask)
    batch = RolloutBatch(mask=mask, sample_ids=sample_ids, token_ids=token_groups, group=group)
    return recipe._weighted(scores, batch, step)
