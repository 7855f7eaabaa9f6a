"""The `token_weights` part of VeRL's configuration, and what VeRL's other parts must be for it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tokenweights._errors import invalid
from tokenweights.recipes import Recipe, rollout_recipe

# Losses that are homogeneous in the advantage, token by token: for w >= 0 the loss of w * A is w
# times the loss of A, so weighting advantages is weighting token losses.
LOSS_MODES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "cispo")


@dataclass(frozen=True)
class TokenWeightsConfig:
    """What `token_weights` in the configuration says.

    Attributes:
        recipe: The recipe.
        token_records: JSONL file to which token records are appended; None writes none.
        token_records_steps: Training steps between two recorded rollout batches, >= 1.
        gradient_probe_steps: Training steps between two gradient probes, >= 1; None probes none.
        gradient_probe_file: JSONL file to which each probe appends a line; None writes none.
        gradient_probe_tolerance: Largest distance of the sum of the projection ratios from one;
            beyond it the probe raises.
    """

    recipe: Recipe
    token_records: str | None = None
    token_records_steps: int = 100
    gradient_probe_steps: int | None = None
    gradient_probe_file: str | None = None
    gradient_probe_tolerance: float = 1e-3


def token_weights_config(config: DictConfig) -> TokenWeightsConfig:
    """The token weights that a VeRL configuration asks for; it is checked, and nothing is started.

    Args:
        config: VeRL's whole configuration with the key `token_weights`.

    Returns:
        The recipe, and where token records go.

    Raises:
        TokenWeightsError: If the recipe is unknown, or VeRL as configured cannot honour it.
    """
    node = OmegaConf.select(config, "token_weights")
    fields: Any = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else {}
    known = [field.name for field in dataclasses.fields(TokenWeightsConfig)]
    if unknown := sorted(set(fields) - set(known)):
        hint = f"Known are {', '.join(known)}."
        raise invalid("verl", "token_weights", "without unknown keys", unknown, hint)
    choice = fields.pop("recipe", None)
    token_weights = TokenWeightsConfig(rollout_recipe(choice, caller="token_weights"), **fields)
    _check(config, token_weights)
    return token_weights


def _check(config: DictConfig, token_weights: TokenWeightsConfig) -> None:
    def require(fits: bool, key: str, condition: str, hint: str) -> None:
        if not fits:
            raise invalid("verl", key, condition, repr(OmegaConf.select(config, key)), hint)

    def require_one(key: str, allowed: tuple[Any, ...], hint: str) -> None:
        names = ", ".join(map(str, allowed))
        require(OmegaConf.select(config, key) in allowed, key, f"one of {names}", hint)

    made, probed = token_weights.recipe, token_weights.gradient_probe_steps is not None
    actor, correction = "actor_rollout_ref.actor", "algorithm.rollout_correction"
    for key in ("token_records_steps", *(["gradient_probe_steps"] if probed else [])):
        fits = isinstance(steps := getattr(token_weights, key), int) and steps >= 1
        require(fits, f"token_weights.{key}", "an integer >= 1", "It counts steps.")
    mode, plain = "trainer.v1.trainer_mode", "Any other trainer of VeRL would ignore the recipe."
    require_one("trainer.use_v1", (True,), plain)
    named = str(OmegaConf.select(config, mode)).startswith("tokenweights_")
    require(named, mode, "tokenweights_sync", plain)
    other_layout = "Other engines lay attention out in their own way."
    require_one(f"{actor}.strategy", ("fsdp", "fsdp2"), other_layout)
    not_linear = "In other losses the advantage is no factor of each token's loss."
    require_one(f"{actor}.policy_loss.loss_mode", LOSS_MODES, not_linear)
    no_pass = "It leaves out the pass for the old log-probabilities, which gives the scores."
    require_one(f"{correction}.bypass_mode", (False, None), no_pass)
    if made.denominator != "all_tokens":
        hint = f"The recipe divides by {made.denominator}; change this, or the recipe."
        require_one(f"{actor}.loss_agg_mode", ("token-mean",), hint)
        require_one(f"{correction}.rollout_rs", (None,), hint)
    if made.signal != "attention_entropy":
        hint = "A record holds attention entropies; the recipe has none."
        require_one("token_weights.token_records", (None,), hint)
        if not probed:
            return
    one_copy = "It packs the responses of a prompt behind one copy of it."
    require_one(f"{actor}.use_prefix_grouper", (False, None), one_copy)
    size, key = "ulysses_sequence_parallel_size", "override_config.attn_implementation"
    sizes = [OmegaConf.select(config, f"{actor}.{part}{size}") for part in ("", "fsdp_config.")]
    if probed and OmegaConf.select(config, f"{actor}.strategy") == "fsdp":
        flat = "The shards of FSDP1 do not know which ranks they are spread over; fsdp2 knows."
        require_one(f"{actor}.fsdp_config.fsdp_size", (-1,), f"{flat} The probe needs it.")
        for part in ("", "fsdp_config."):
            require_one(f"{actor}.{part}{size}", (None, 1), f"{flat} The probe needs it.")
    attention = OmegaConf.select(config, f"actor_rollout_ref.model.{key}") or "flash_attention_2"
    require(
        max(value or 1 for value in sizes) == 1 or "flash" in attention,
        f"actor_rollout_ref.model.{key}",
        "flash attention under Ulysses",
        "VeRL's sequence parallelism reaches no other attention; results would be wrong.",
    )
