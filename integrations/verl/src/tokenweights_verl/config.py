"""The `token_weights` part of VeRL's configuration, and what VeRL's other parts must be for it."""

from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tokenweights import TokenWeightsConfig
from tokenweights._errors import invalid
from tokenweights.recipes import corrects_sampler, require_columns

from tokenweights_verl.scores import COLUMNS

# Losses that are homogeneous in the advantage, token by token: for w >= 0 the loss of w * A is w
# times the loss of A, so weighting advantages is weighting token losses.
LOSS_MODES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "cispo")


def token_weights_config(config: DictConfig) -> TokenWeightsConfig:
    """The token weights that a VeRL configuration asks for; it is checked, and nothing is started.

    Args:
        config: VeRL's whole configuration with the key `token_weights`.

    Returns:
        The options.

    Raises:
        TokenWeightsError: If the recipe is unknown, or VeRL as configured cannot honour it.
    """
    node = OmegaConf.select(config, "token_weights")
    asked: Any = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else {}
    known = [field.name for field in fields(TokenWeightsConfig)]
    if unknown := sorted(set(asked) - set(known)):
        hint = f"Known are {', '.join(known)}."
        raise invalid("verl", "token_weights", "without unknown keys", unknown, hint)
    token_weights = TokenWeightsConfig(**asked)
    _check(config, token_weights)
    return token_weights


def _check(config: DictConfig, token_weights: TokenWeightsConfig) -> None:
    def require(fits: bool, key: str, condition: str, hint: str) -> None:
        if not fits:
            raise invalid("verl", key, condition, repr(OmegaConf.select(config, key)), hint)

    def require_one(key: str, allowed: tuple[Any, ...], hint: str) -> None:
        names = ", ".join(map(str, allowed))
        require(OmegaConf.select(config, key) in allowed, key, f"one of {names}", hint)

    made, probed = token_weights.token_recipe, token_weights.gradient_probe_steps is not None
    actor, correction = "actor_rollout_ref.actor", "algorithm.rollout_correction"
    rollout, kl = "actor_rollout_ref.rollout.calculate_log_probs", "use_kl_loss"
    reference = (f"{actor}.{kl}", "algorithm.use_kl_in_reward")
    given = {*COLUMNS, "attention"}
    given -= set() if OmegaConf.select(config, rollout) else {"sampler_log_probs"}
    uses_reference = any(OmegaConf.select(config, key) for key in reference)
    given -= set() if uses_reference else {"reference_log_probs"}
    require_columns(made, given, caller="verl")
    if corrects_sampler(made):
        twice = "VeRL and the recipe would both multiply by the ratio of trainer to sampler."
        require_one(f"{correction}.rollout_is", (None,), twice)
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
    distilled, task = "distillation.enabled", "distillation.distillation_loss.use_task_rewards"
    if OmegaConf.select(config, distilled):
        require_one(task, (True,), "There is no other loss that has advantages.")
    if made.denominator != "all_tokens":
        hint = f"The recipe divides by {made.denominator}; change this, or the recipe."
        require_one(f"{actor}.loss_agg_mode", ("token-mean",), hint)
        require_one(f"{correction}.rollout_rs", (None,), hint)
    if made.attention is None and not probed:
        return
    one_copy = "It packs the responses of a prompt behind one copy of it."
    require_one(f"{actor}.use_prefix_grouper", (False, None), one_copy)
    size, key = "ulysses_sequence_parallel_size", "override_config.attn_implementation"
    sizes = [OmegaConf.select(config, f"{actor}.{part}{size}") for part in ("", "fsdp_config.")]
    if probed:
        once = "It counts backward passes, and the probe makes a forward pass without one."
        require_one("actor_rollout_ref.model.enable_activation_offload", (False, None), once)
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
