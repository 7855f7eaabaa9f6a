"""The options of the token weights, and what of OpenRLHF's own options they go together with."""

from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from tokenweights._errors import invalid
from tokenweights.recipes import Recipe, rollout_recipe


@dataclass(frozen=True)
class TokenWeightsConfig:
    """What `--tokenweights.*` says; OpenRLHF's actors find it as `strategy.args.tokenweights`.

    Args:
        recipe: Name of a recipe, or a dict of recipe fields with `name` first, also as JSON.
        token_records: JSONL file to which token records are appended; None writes none.
        token_records_steps: Global steps between two recorded rollout batches, >= 1.
        gradient_probe_steps: Global steps between two gradient probes, >= 1; None probes never.
        gradient_probe_file: JSONL file to which each probe appends a line; None writes none.
        gradient_probe_tolerance: Largest distance of the sum of a probe's projection ratios from
            one; beyond it the probe raises.

    Raises:
        TokenWeightsError: If the recipe is unknown or does not fit the other arguments.

    Example:
        >>> TokenWeightsConfig("low2high").token_recipe.denominator
        'all_tokens'
    """

    recipe: dict[str, Any] | str | None
    token_records: str | None = None
    token_records_steps: int = 100
    gradient_probe_steps: int | None = None
    gradient_probe_file: str | None = None
    gradient_probe_tolerance: float = 1e-3

    def __post_init__(self) -> None:
        def refuse(field: str, condition: str, hint: str) -> None:
            got = repr(getattr(self, field))
            raise invalid("TokenWeightsConfig", field, condition, got, hint)

        signal = self.token_recipe.signal
        if self.token_records_steps < 1:
            refuse("token_records_steps", ">= 1", "It is a number of global steps.")
        if self.gradient_probe_steps is not None and self.gradient_probe_steps < 1:
            refuse("gradient_probe_steps", ">= 1", "It is a number of global steps.")
        if self.gradient_probe_file is not None and self.gradient_probe_steps is None:
            refuse("gradient_probe_file", "None", "Set gradient_probe_steps too.")
        if self.token_records is not None and signal != "attention_entropy":
            hint = "A record holds attention entropies; the recipe has none."
            refuse("token_records", "None", hint)
        for field in ("token_records", "gradient_probe_file"):
            if getattr(self, field) is not None:
                # The actor that writes it has a working directory of its own.
                path = Path(getattr(self, field)).absolute()
                if path.is_dir() or not path.parent.is_dir():
                    refuse(field, "a file in a folder that exists", "Make the folder first.")
                object.__setattr__(self, field, str(path))

    @property
    def token_recipe(self) -> Recipe:
        """The recipe that `recipe` names."""
        return rollout_recipe(self.recipe, caller="TokenWeightsConfig")


def checked_arguments(arguments: Any, config: TokenWeightsConfig) -> Any:
    """OpenRLHF's arguments with `tokenweights` added, if the recipe can be honoured with them.

    Args:
        arguments: The nested namespace that `openrlhf.utils.config.hierarchize` gives.
        config: The options of the token weights.

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
            (attrgetter(option)(arguments) == value or not probed, option, repr(value), _PROBE)
            for option, value in _PROBED_WITH
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
    ("ds.ring_attn_size", 1),
    ("ds.tensor_parallel_size", 1),
    ("ds.deepcompile", False),
    ("data.max_images_per_prompt", 0),
    ("actor.gradient_checkpointing_reentrant", False),
)
_HEADS = "Each rank sees only its own heads and logits there, and a score needs all of them."
