"""The `token_weights` part of VeRL's configuration, and what VeRL's other parts must be for it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tokenweights._errors import invalid
from tokenweights.recipes import Recipe, recipe

# Losses that are homogeneous in the advantage, token by token: for w >= 0 the loss of w * A is w
# times the loss of A, so weighting advantages is weighting token losses.
LOSS_MODES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "cispo")
STRATEGIES = ("fsdp", "fsdp2")


@dataclass(frozen=True)
class TokenWeightsConfig:
    """What `token_weights` in the configuration says.

    Attributes:
        recipe: The recipe.
        token_records: JSONL file to which token records are appended; None writes none.
        token_records_steps: Training steps between two recorded rollout batches, >= 1.
    """

    recipe: Recipe
    token_records: str | None = None
    token_records_steps: int = 100


def token_weights_config(config: DictConfig) -> TokenWeightsConfig:
    """The token weights that a VeRL configuration asks for.

    Reads and checks, and starts nothing: a misspelt recipe, or one that VeRL as configured cannot
    honour, is refused here, before a worker or a model is loaded.

    Args:
        config: VeRL's whole configuration with the key `token_weights`.

    Returns:
        The recipe and where token records go.

    Raises:
        TokenWeightsError: If the recipe is unknown or does not fit the rest.

    Example:
        >>> token_weights_config(OmegaConf.create({"token_weights": {"recipe": "full"}}))
        Traceback (most recent call last):
        ...
        tokenweights._errors.TokenWeightsError: `verl`: expected `actor_rollout_ref.actor.strategy` \
one of fsdp, fsdp2, got None. Other engines lay attention out in their own way.
    """
    node = OmegaConf.select(config, "token_weights")
    fields = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else {}
    known = [field.name for field in dataclasses.fields(TokenWeightsConfig)]
    if unknown := sorted(set(fields) - set(known)):
        hint = f"Known are {', '.join(known)}."
        raise invalid("verl", "token_weights", "without unknown keys", unknown, hint)
    if not fields.get("recipe"):
        hint = "Add `+token_weights.recipe=low2high`."
        raise invalid("verl", "token_weights.recipe", "a name or fields", None, hint)
    token_weights = TokenWeightsConfig(**{**fields, "recipe": recipe(fields["recipe"])})
    _check(config, token_weights)
    return token_weights


def _check(config: DictConfig, token_weights: TokenWeightsConfig) -> None:
    made = token_weights.recipe

    def refuse(key: str, condition: str, hint: str) -> None:
        raise invalid("verl", key, condition, repr(OmegaConf.select(config, key)), hint)

    def require(key: str, allowed: tuple[Any, ...], hint: str) -> None:
        if OmegaConf.select(config, key) not in allowed:
            refuse(key, f"one of {', '.join(str(value) for value in allowed)}", hint)

    steps = token_weights.token_records_steps
    if not isinstance(steps, int) or steps < 1:
        refuse("token_weights.token_records_steps", "an integer >= 1", "It counts steps.")
    if token_weights.token_records and made.signal != "attention_entropy":
        hint = "A record holds attention entropies; the recipe has none."
        refuse("token_weights.token_records", "null", hint)
    if made.signal == "loss_magnitude":
        refuse(
            "token_weights.recipe",
            "with a signal other than loss_magnitude",
            "At rollout time the ratio is 1, so |loss| is |advantage|, the same for every token of "
            "a response: there is nothing to rank. Use `predictive_low20` or `predictive_high20`.",
        )
    actor, model = "actor_rollout_ref.actor", "actor_rollout_ref.model"
    require(f"{actor}.strategy", STRATEGIES, "Other engines lay attention out in their own way.")
    not_linear = "In other losses the advantage is no factor of each token's loss."
    require(f"{actor}.policy_loss.loss_mode", LOSS_MODES, not_linear)
    correction = "algorithm.rollout_correction"
    if OmegaConf.select(config, f"{correction}.bypass_mode"):
        hint = "It leaves out the pass for the old log-probabilities, which gives the scores."
        refuse(f"{correction}.bypass_mode", "False", hint)
    if made.denominator != "all_tokens":
        hint = f"The recipe divides by {made.denominator}; change this, or the recipe."
        require(f"{actor}.loss_agg_mode", ("token-mean",), hint)
        require(f"{correction}.rollout_rs", (None,), hint)
    if made.signal == "attention_entropy":
        grouped = "It packs the responses of a prompt behind one copy of it."
        require(f"{actor}.use_prefix_grouper", (False, None), grouped)
        key = f"{model}.override_config.attn_implementation"
        ranks = max(
            OmegaConf.select(config, f"{actor}.{place}ulysses_sequence_parallel_size") or 1
            for place in ("", "fsdp_config.")
        )
        if ranks > 1 and "flash" not in (OmegaConf.select(config, key) or "flash_attention_2"):
            hint = "VeRL's sequence parallelism reaches no other attention; results would be wrong."
            refuse(key, f"flash attention with {ranks} sequence-parallel ranks", hint)
