"""What OpenRLHF's own options must be for the token weights that a run asks for."""

from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from typing import Any

from tokenweights import TokenWeightsConfig, recipe, require_columns
from tokenweights._errors import TokenWeightsError, invalid
from tokenweights.recipes import corrects_sampler

from tokenweights_openrlhf.scores import COLUMNS, OF_A_PASS


def checked_arguments(arguments: Any, config: TokenWeightsConfig) -> Any:
    """OpenRLHF's arguments with `tokenweights` added, if the recipe can be honoured with them.

    Args:
        arguments: The nested namespace that `openrlhf.utils.config.hierarchize` gives.
        config: The options of the token weights; OpenRLHF's trainer finds them there too.

    Returns:
        The same namespace.

    Raises:
        TokenWeightsError: If OpenRLHF could not train with them as the recipe asks.
    """
    made, probed = config.token_recipe, config.gradient_probe_steps is not None
    tokens, of_a_pass = made.denominator == "all_tokens", {*OF_A_PASS} & {*made.columns}
    for asked, option, fit, hint in (
        (True, "actor.policy_loss_type", ["ppo"], _SEQUENCE_RATIO),
        (not tokens, "actor.loss_agg_mode", ["token-mean"], _DIVISOR.format(made.denominator)),
        (arguments.train.dynamic_batch_enable, "ds.zero_stage", [3], _DYNAMIC),
        (of_a_pass, "ds.tensor_parallel_size", [1], _HEADS),
        (of_a_pass, "data.max_images_per_prompt", [0], _IMAGES),
        *((corrects_sampler(made), *row, _TWICE) for row in _CORRECTED_ONCE),
        *((probed, *row, _PROBE) for row in _PROBED_WITH),
    ):
        value = attrgetter(option)(arguments)
        if asked and value not in fit:
            raise invalid("train", f"--{option}", " or ".join(map(repr, fit)), repr(value), hint)
    sampled, kl = arguments.algo.advantage.is_correction_level != "off", arguments.algo.kl
    given = {*COLUMNS, *OF_A_PASS} - (set() if sampled else {"sampler_log_probs"})
    given -= set() if kl.use_loss and kl.init_coef > 0 else {"reference_log_probs"}
    require_columns(made, given, caller="train")
    arguments.tokenweights = _as_text(config)
    # All that policy actors look up: they need no import that only a user's recipe leads to.
    arguments.policy_attention = made.attention
    arguments.policy_entropy = "predictive_entropy" in made.columns
    return arguments


def _as_text(config: TokenWeightsConfig) -> TokenWeightsConfig:
    """The same options, the recipe as plain values where these say all of it.

    OpenRLHF's arguments go to every worker; so only the trainer imports what a user wrote.
    """
    made = config.token_recipe
    with suppress(TokenWeightsError):
        if not isinstance(config.recipe, str) and recipe(made.to_dict()) == made:
            return replace(config, recipe=made.to_dict())
    return config


_SEQUENCE_RATIO = (
    "A sequence-level ratio sums the gradients of a response before it multiplies them by the "
    "advantages, so only the mean weight of a response would act."
)
_DIVISOR = "The recipe divides by {}; change this, or the recipe."
_DYNAMIC = (
    "OpenRLHF's gradient with --train.dynamic_batch_enable is wrong at a lower stage, with token "
    "weights or without."
)
_HEADS = "Each rank sees only its own heads and logits there, and a score needs all of them."
_IMAGES = "Scores of responses to images have not been checked."
_TWICE = (
    "The recipe and OpenRLHF would both multiply by the ratio of trainer to sampler. With 'token', "
    "'clip' and 1 1 OpenRLHF changes nothing, and still asks its engines for log-probabilities."
)
_CORRECTED_ONCE: tuple[tuple[str, list[Any]], ...] = (
    ("algo.advantage.is_correction_level", ["token"]),
    ("algo.advantage.is_correction_mode", ["clip"]),
    ("algo.advantage.is_correction_threshold", [[1, 1]]),
)
_PROBE = "The gradient probe has not been made for it: leave out gradient_probe_steps."
_PROBED_WITH: tuple[tuple[str, list[Any]], ...] = (
    ("ds.param_dtype", ["bf16", "fp32"]),  # gradients in float16 need a scale
    ("ds.ring_attn_size", [1]),
    ("ds.tensor_parallel_size", [1]),
    ("ds.deepcompile", [False]),
    ("data.max_images_per_prompt", [0]),
    ("actor.gradient_checkpointing_reentrant", [False]),
)
