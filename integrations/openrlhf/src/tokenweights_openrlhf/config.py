"""The options of the token weights, and what of OpenRLHF's own options they go together with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenweights._errors import invalid
from tokenweights.recipes import Recipe, recipe


@dataclass(frozen=True)
class TokenWeightsConfig:
    """What `--tokenweights.*` says; OpenRLHF's actors find it as `strategy.args.tokenweights`.

    Args:
        recipe: Name of a recipe, or a dict of recipe fields with `name` first; text that begins
            with a brace is read as JSON.
        token_records: JSONL file to which token records are appended; None writes none.
        token_records_steps: Global steps between two recorded rollout batches, >= 1.

    Raises:
        TokenWeightsError: If the recipe is unknown or does not fit the other arguments.

    Example:
        >>> TokenWeightsConfig("low2high").token_recipe.denominator
        'all_tokens'
    """

    recipe: dict[str, Any] | str | None
    token_records: str | None = None
    token_records_steps: int = 100

    def __post_init__(self) -> None:
        token_recipe, name = self.token_recipe, "TokenWeightsConfig"
        if token_recipe.signal == "loss_magnitude":
            condition = "with a signal other than loss_magnitude"
            raise invalid(name, "recipe", condition, repr(token_recipe.name), _NO_LOSS_RANKS)
        if self.token_records_steps < 1:
            hint, got = "It is a number of global steps.", self.token_records_steps
            raise invalid(name, "token_records_steps", ">= 1", got, hint)
        if self.token_records is None:
            return
        if token_recipe.signal != "attention_entropy":
            hint = "A record holds attention entropies; the recipe has none."
            raise invalid(name, "token_records", "None", repr(self.token_records), hint)
        # The actor that writes it has a working directory of its own.
        path = Path(self.token_records).absolute()
        if path.is_dir() or not path.parent.is_dir():
            condition, hint = "a file in a folder that exists", "Make the folder, or correct it."
            raise invalid(name, "token_records", condition, repr(self.token_records), hint)
        object.__setattr__(self, "token_records", str(path))

    @property
    def token_recipe(self) -> Recipe:
        """The recipe that `recipe` names."""
        return recipe(_parsed(self.recipe))


def checked_arguments(arguments: Any, config: TokenWeightsConfig) -> Any:
    """OpenRLHF's arguments with `tokenweights` added, if the recipe can be honoured with them.

    Args:
        arguments: The nested namespace that `openrlhf.utils.config.hierarchize` gives.
        config: The options of the token weights.

    Returns:
        The same namespace.

    Raises:
        TokenWeightsError: If OpenRLHF could not train with them what the recipe asks for.
    """
    token_recipe = config.token_recipe

    def require(fits: bool, option: str, condition: str, hint: str) -> None:
        got: Any = arguments
        for part in option.split("."):
            got = getattr(got, part)
        if not fits:
            raise invalid("tokenweights_openrlhf", f"--{option}", condition, repr(got), hint)

    require(
        arguments.actor.policy_loss_type == "ppo",
        "actor.policy_loss_type",
        "'ppo'",
        "A sequence-level ratio sums the gradients of a response before it multiplies them by the "
        "advantages, so only the mean weight of a response would act.",
    )
    require(
        token_recipe.denominator == "all_tokens" or arguments.actor.loss_agg_mode == "token-mean",
        "actor.loss_agg_mode",
        "'token-mean'",
        f"The recipe divides by {token_recipe.denominator}, which only a mean over the tokens of "
        "the batch can be made to do; change this, or the recipe's denominator.",
    )
    require(
        arguments.ds.zero_stage == 3 or not arguments.train.dynamic_batch_enable,
        "ds.zero_stage",
        "3 with --train.dynamic_batch_enable",
        "With a lower stage OpenRLHF's gradient over several micro-batches is not their sum, with "
        "token weights or without.",
    )
    if token_recipe.signal != "none":
        require(
            arguments.ds.tensor_parallel_size == 1,
            "ds.tensor_parallel_size",
            "1",
            "Each rank sees only its own heads and logits there, and a score needs all of them.",
        )
        require(
            arguments.data.max_images_per_prompt == 0,
            "data.max_images_per_prompt",
            "0",
            "Scores of responses to images have not been checked.",
        )
    arguments.tokenweights = config
    return arguments


_NO_LOSS_RANKS = (
    "At rollout time the ratio is 1, so |loss| is |advantage|, the same for every token of a "
    "response: there is nothing to rank. Use `predictive_low20` or `predictive_high20`."
)


def _parsed(text: dict[str, Any] | str | None) -> dict[str, Any] | str:
    hint = (
        "Write `--tokenweights.recipe low2high` or "
        '`--tokenweights.recipe \'{"name": "low2high", "warmup_steps": 50}\'`.'
    )
    if not text:
        raise invalid("TokenWeightsConfig", "recipe", "a recipe name or a dict", repr(text), hint)
    if isinstance(text, str) and text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            condition = "a name or valid JSON"
            raise invalid("TokenWeightsConfig", "recipe", condition, repr(text), hint) from error
    return text
