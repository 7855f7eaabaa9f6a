"""The `token_weights` part of VeRL's configuration, and what VeRL's other parts must be for it."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from tokenweights import TokenWeightsConfig
from tokenweights.adapters import corrects_sampler, invalid, require_columns, require_version
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

from tokenweights_verl.scores import COLUMNS

# Losses that are homogeneous in the advantage, token by token: for w >= 0 the loss of w * A is w
# times the loss of A, so weighting advantages is weighting token losses.
LOSS_MODES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "cispo")
# Losses that divide by a token count, which a factor on the advantages can exchange.
TOKEN_MEAN_LOSS_MODES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "gpg", "cispo")


def token_weights_config(config: DictConfig) -> TokenWeightsConfig:
    """The token weights that a VeRL configuration asks for; it is checked, and nothing is started.

    Args:
        config: VeRL's whole configuration with the key `token_weights`.

    Returns:
        The options.

    Raises:
        TokenWeightsError: If the recipe is unknown, or this VeRL as configured cannot honour it.
    """
    require_version("verl", "0.9", "0.10")
    node = OmegaConf.select(config, "token_weights")
    asked: Any = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else {}
    token_weights = TokenWeightsConfig.from_mapping(asked)
    _check(config, token_weights)
    return token_weights


def _check(config: DictConfig, token_weights: TokenWeightsConfig) -> None:
    made, probed = token_weights.token_recipe, token_weights.gradient_probe_steps is not None

    def selected(*keys: str) -> list[Any]:
        return [OmegaConf.select(config, key) for key in keys]

    given = {*COLUMNS, "attention"} - (set() if all(selected(_SAMPLER)) else {"sampler_log_probs"})
    given -= set() if any(selected(*_REFERENCE)) else {"reference_log_probs"}
    require_columns(made, given, caller="verl")
    read, divided = made.attention is not None or probed, made.denominator != "all_tokens"
    columns = probed or made.attention != made.entropy
    mode, strategy, distilled = selected(_MODE, f"{_ACTOR}.strategy", "distillation.enabled")
    kept = any(selected(*_OFFLOADED)) and strategy == "fsdp2" and "separate" in mode
    flat, spread = probed and strategy == "fsdp", read and strategy == "megatron"
    sliced = any((size or 1) > 1 for size in selected(*_ULYSSES))
    elsewhere = sliced and "flash" not in (selected(_ATTENTION)[0] or "flash_attention_2")
    divisor = f"The recipe divides by {made.denominator}; change this, or the recipe."
    for asked, key, fit, hint in (
        (True, "trainer.use_v1", (True,), _PLAIN),
        (True, _MODE, _own_trainers(), _PLAIN),
        (True, f"{_ACTOR}.strategy", _ENGINES[: 3 - columns], _OTHER_LAYOUT),
        (True, f"{_ACTOR}.policy_loss.loss_mode", LOSS_MODES, _NOT_LINEAR),
        (True, f"{_CORRECTION}.bypass_mode", (False, None), _NO_PASS),
        (corrects_sampler(made), f"{_CORRECTION}.rollout_is", (None,), _TWICE),
        (kept, "trainer.v1.separate_async.parameter_sync_step", (1,), _KEPT),
        (distilled, "distillation.distillation_loss.use_task_rewards", (True,), _DISTILLED),
        (divided, f"{_ACTOR}.policy_loss.loss_mode", TOKEN_MEAN_LOSS_MODES, divisor),
        (divided, f"{_ACTOR}.loss_agg_mode", ("token-mean",), divisor),
        (divided, f"{_CORRECTION}.rollout_rs", (None,), divisor),
        (read, f"{_ACTOR}.use_prefix_grouper", (False, None), _ONE_COPY),
        (probed, "actor_rollout_ref.model.enable_activation_offload", (False, None), _ONCE),
        (flat, f"{_ACTOR}.fsdp_config.fsdp_size", (-1,), _FLAT),
        *((flat, size, (None, 1), _FLAT) for size in _ULYSSES),
        *((spread, f"actor_rollout_ref.{off}", (False, None), _OTHER_LAYOUT) for off in _DARK),
        (read and elsewhere, _ATTENTION, ("flash_attention_2", "flash_attention_3"), _SLICED),
    ):
        (value,) = selected(key)
        if asked and value not in fit:
            raise invalid("verl", key, f"one of {', '.join(map(str, fit))}", repr(value), hint)


def _own_trainers() -> list[str]:
    """Names of the registered trainers that weigh tokens, a user's own among them."""
    from tokenweights_verl.trainer import TokenWeightsMixin  # which imports this module

    return [name for name, made in TRAINER_REGISTRY.items() if issubclass(made, TokenWeightsMixin)]


_ACTOR, _CORRECTION = "actor_rollout_ref.actor", "algorithm.rollout_correction"
_MODE, _SAMPLER = "trainer.v1.trainer_mode", "actor_rollout_ref.rollout.calculate_log_probs"
_REFERENCE = (f"{_ACTOR}.use_kl_loss", "algorithm.use_kl_in_reward")
_ATTENTION = "actor_rollout_ref.model.override_config.attn_implementation"
_ULYSSES = [f"{_ACTOR}{of}.ulysses_sequence_parallel_size" for of in ("", ".fsdp_config")]
# The last of the engines gives entropies alone.
_ENGINES = ("fsdp", "fsdp2", "megatron")
_OFFLOADED = [f"{_ACTOR}.fsdp_config.{of}" for of in ("param_offload", "offload_policy")]
_DARK = ("model.use_fused_kernels", "model.mtp.enable", "actor.megatron.dynamic_context_parallel")
_KEPT = "VeRL overwrites the older weights that it keeps of offloaded parameters."
_PLAIN = "Any other trainer of VeRL would ignore the recipe."
_OTHER_LAYOUT = "Other engines lay attention out in their own way."
_NOT_LINEAR = "In other losses the advantage is no factor of each token's loss."
_NO_PASS = "It leaves out the pass for the old log-probabilities, which gives the scores."
_TWICE = "VeRL and the recipe would both multiply by the ratio of trainer to sampler."
_DISTILLED = "There is no other loss that has advantages."
_ONE_COPY = "It packs the responses of a prompt behind one copy of it."
_ONCE = "It counts backward passes, and the probe makes a forward pass without one."
_FLAT = "The shards of FSDP1 do not know which ranks they are spread over, as the probe has to."
_SLICED = "VeRL's sequence parallelism reaches flash attention only; results would be wrong."
