"""What OpenRLHF's own options must be for the token weights that a run asks for."""

from operator import attrgetter
from typing import Any

from tokenweights import TokenWeightsConfig
from tokenweights._errors import invalid


def checked_arguments(arguments: Any, config: TokenWeightsConfig) -> Any:
    """OpenRLHF's arguments with `tokenweights` added, if the recipe can be honoured with them.

    Args:
        arguments: The nested namespace that `openrlhf.utils.config.hierarchize` gives.
        config: The options of the token weights; OpenRLHF's actors find them there too.

    Returns:
        The same namespace.

    Raises:
        TokenWeightsError: If OpenRLHF could not train with them as the recipe asks.
    """
    made, actor, ds = config.token_recipe, arguments.actor, arguments.ds
    scored, tokens = made.signal != "none", made.denominator == "all_tokens"
    dynamic = arguments.train.dynamic_batch_enable
    probed = config.gradient_probe_steps is not None
    for fits, option, condition, hint in (
        (actor.policy_loss_type == "ppo", "actor.policy_loss_type", "'ppo'", _SEQUENCE_RATIO),
        (
            tokens or actor.loss_agg_mode == "token-mean",
            "actor.loss_agg_mode",
            "'token-mean'",
            f"The recipe divides by {made.denominator}; change this, or the recipe.",
        ),
        (
            ds.zero_stage == 3 or not dynamic,
            "ds.zero_stage",
            "3 with --train.dynamic_batch_enable",
            "At a lower stage OpenRLHF's gradient is wrong there, with token weights or without.",
        ),
        (ds.tensor_parallel_size == 1 or not scored, "ds.tensor_parallel_size", "1", _HEADS),
        (
            arguments.data.max_images_per_prompt == 0 or not scored,
            "data.max_images_per_prompt",
            "0",
            "Scores of responses to images have not been checked.",
        ),
        *(
            (attrgetter(option)(arguments) in fit or not probed, option, f"one of {fit}", _PROBE)
            for option, fit in _PROBED_WITH
        ),
    ):
        if not fits:
            got = repr(attrgetter(option)(arguments))
            raise invalid("train", f"--{option}", condition, got, hint)
    arguments.tokenweights = config
    return arguments


_SEQUENCE_RATIO = (
    "A sequence-level ratio sums the gradients of a response before it multiplies them by the "
    "advantages, so only the mean weight of a response would act."
)
_PROBE = "The gradient probe has not been made for it: leave out gradient_probe_steps."
_PROBED_WITH = (
    ("ds.param_dtype", ["bf16", "fp32"]),  # gradients in float16 need a scale
    ("ds.ring_attn_size", [1]),
    ("ds.tensor_parallel_size", [1]),
    ("ds.deepcompile", [False]),
    ("data.max_images_per_prompt", [0]),
    ("actor.gradient_checkpointing_reentrant", [False]),
)
_HEADS = "Each rank sees only its own heads and logits there, and a score needs all of them."
