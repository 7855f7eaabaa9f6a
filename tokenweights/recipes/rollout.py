"""What a recipe makes of one rollout batch: the part that all trainer adapters share."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.diagnostics import token_weight_metrics
from tokenweights.distributed import agreed
from tokenweights.recipes.named import recipe
from tokenweights.recipes.record import Recipe


@typed
def rollout_recipe(choice: str | Mapping[str, Any] | Recipe | None, *, caller: str) -> Recipe:
    """The recipe that a user chose for a trainer, if scores of a rollout batch can serve it.

    Args:
        choice: As `recipe` takes it, or the JSON text of a mapping, as a command line has it.
        caller: What the user called, for the message of an error.

    Returns:
        The recipe.

    Raises:
        TokenWeightsError: If the choice is empty or unknown, or the signal is `"loss_magnitude"`.

    Example:
        >>> rollout_recipe('{"name": "low2high", "warmup_steps": 50}', caller="train").warmup_steps
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
    if made.signal == "loss_magnitude":
        raise invalid(
            caller,
            "recipe",
            "with a signal other than loss_magnitude",
            repr(made.name),
            "At rollout time the ratio is 1, so |loss| is |advantage|, the same for every token of "
            "a response: there is nothing to rank. Use `predictive_low20` or `predictive_high20`.",
        )
    return made


@dataclass(frozen=True)
class WeightedRollout:
    """Weights of a rollout batch's tokens, and what to log about them.

    Attributes:
        weights: Token weights, `batch token`, >= 0, 0 off the mask.
        scale: The factor on the weights that turns a mean over all valid tokens into the recipe's
            mean, see `Recipe.denominator_scale`.
        metrics: Those of `token_weight_metrics`, and `endpoint_low` and `endpoint_high` for a soft
            recipe; empty if the batch has no valid token.
    """

    weights: Float[Tensor, "batch token"]
    scale: Float[Tensor, ""]
    metrics: dict[str, float]


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
    """Weights, denominator scale and metrics of a rollout batch, exact over ranks, detached.

    A trainer that multiplies its advantages by `weights * scale` and goes on as it is follows the
    recipe, if its loss is homogeneous in the advantage and divides by the number of valid tokens.

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
    weights = recipe.token_weights(
        scores, mask, step=step, sample_ids=sample_ids, token_groups=token_groups, group=group
    )
    metrics = token_weight_metrics(scores, weights, mask, group=group)
    if metrics and recipe.rule == "endpoints":
        endpoints = recipe.endpoints(step)
        metrics |= {"endpoint_low": endpoints.low, "endpoint_high": endpoints.high}
    scale = recipe.denominator_scale(weights, mask, group=group)
    return WeightedRollout(weights, scale, metrics)
