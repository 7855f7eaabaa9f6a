"""The training arguments: everything `GRPOConfig` knows, and what a run asks of token weights."""

import pickle
from dataclasses import dataclass, field, fields
from typing import Any

from tokenweights import TokenWeightsConfig
from tokenweights._errors import TokenWeightsError, invalid
from tokenweights.recipes import Recipe, corrects_sampler, require_columns, rollout_recipe
from tokenweights.recipes.config import FILES
from trl.trainer.grpo_config import GRPOConfig

# Losses that are homogeneous in the advantage at token-level ratios: for w >= 0 the loss of w * A
# is w times the loss of A, so weighting advantages is weighting token losses.
LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo", "luspo")
# Losses that divide by a token count, which a factor on the advantages can exchange.
TOKEN_MEAN_LOSS_TYPES = ("dapo", "bnpo", "cispo", "vespo")
# Columns of a rollout batch that TRL has or that a pass gives.
COLUMNS = ("token_ids", "advantages", "log_probs", "predictive_entropy", "attention")

# The options that every adapter has, with what a command line says of them.
HELP = {option.name: {"help": option.metadata["help"]} for option in fields(TokenWeightsConfig)}


@dataclass
class TokenWeightsGRPOConfig(GRPOConfig):
    """Arguments of `TokenWeightsGRPOTrainer`: those of `trl.GRPOConfig` and `TokenWeightsConfig`.

    A recipe that is misspelt, or that the chosen loss cannot honour, is refused here, before
    a model or a dataset is loaded. Steps are optimizer steps.

    Args:
        recipe: As in `tokenweights.TokenWeightsConfig`, like the next six.
        token_records: A file.
        token_records_steps: Steps between two recorded rollout batches.
        gradient_probe_steps: Steps between two gradient probes.
        gradient_probe_file: A file.
        gradient_probe_tolerance: What a probe's projection ratios may be off.
        metrics_file: A file.

    Raises:
        TokenWeightsError: If the recipe is unknown or does not fit the other arguments.

    Example:
        >>> arguments = TokenWeightsGRPOConfig("out", recipe="low2high", use_cpu=True, bf16=False)
        >>> arguments.token_recipe.denominator
        'all_tokens'
    """

    # TRL's parser takes the second of the types, and gives the text as it is.
    recipe: Recipe | str | dict[str, Any] | None = field(default=None, metadata=HELP["recipe"])
    token_records: str | None = field(default=None, metadata=HELP["token_records"])
    token_records_steps: int = field(default=100, metadata=HELP["token_records_steps"])
    gradient_probe_steps: int | None = field(default=None, metadata=HELP["gradient_probe_steps"])
    gradient_probe_file: str | None = field(default=None, metadata=HELP["gradient_probe_file"])
    gradient_probe_tolerance: float | None = field(
        default=None, metadata=HELP["gradient_probe_tolerance"]
    )
    metrics_file: str | None = field(default=None, metadata=HELP["metrics_file"])

    def __post_init__(self) -> None:
        # What no adapter can honour is found before TRL asks for a device.
        shared = TokenWeightsConfig(**{name: getattr(self, name) for name in HELP})
        for name in FILES:
            setattr(self, name, getattr(shared, name))  # absolute
        super().__post_init__()
        _check(self, shared.token_recipe)

    def to_dict(self) -> dict[str, Any]:
        """As TRL's; a recipe object is written as plain values, or in words if it has none."""
        return super().to_dict() | {"recipe": _plain(self.recipe)}

    def __getstate__(self) -> dict[str, Any]:
        """What `training_args.bin` holds: a part that cannot be pickled must not stop a run."""
        try:
            pickle.dumps(self.recipe)
        except Exception:  # each object has its own reason
            return vars(self) | {"recipe": _plain(self.recipe)}
        return vars(self)

    @property
    def token_recipe(self) -> Recipe:
        """The recipe that `recipe` names."""
        return rollout_recipe(self.recipe, caller=type(self).__name__)


def _plain(made: Any) -> Any:
    """A recipe object as plain values; in words if a part of it has no import that leads to it."""
    try:
        return made.to_dict() if isinstance(made, Recipe) else made
    except TokenWeightsError:
        return made.describe()


def _check(arguments: TokenWeightsGRPOConfig, token_recipe: Recipe) -> None:
    def refuse(argument: str, condition: str, hint: str) -> None:
        got = repr(getattr(arguments, argument))
        raise invalid("TokenWeightsGRPOConfig", argument, condition, got, hint)

    asked = {"sampler_log_probs": arguments.use_vllm, "reference_log_probs": arguments.beta != 0}
    given = [*COLUMNS, *(name for name, there in asked.items() if there)]
    require_columns(token_recipe, given, caller="TokenWeightsGRPOConfig")
    if arguments.vllm_importance_sampling_correction and corrects_sampler(token_recipe):
        twice = "TRL and the recipe would both multiply by the ratio of trainer to sampler."
        refuse("vllm_importance_sampling_correction", "False", twice)
    if arguments.importance_sampling_level != "token":
        refuse(
            "importance_sampling_level",
            "'token'",
            "A sequence-level ratio sums the gradients of a response before it multiplies them by "
            "the advantages, so only the mean weight of a response would act.",
        )
    if arguments.loss_type not in LOSS_TYPES:
        refuse("loss_type", f"one of {', '.join(LOSS_TYPES)}", "No other loss has been checked.")
    if token_recipe.denominator != "all_tokens":
        reason = f"The recipe divides by {token_recipe.denominator}; change this, or the recipe."
        if arguments.loss_type not in TOKEN_MEAN_LOSS_TYPES:
            refuse("loss_type", f"one of {', '.join(TOKEN_MEAN_LOSS_TYPES)}", reason)
        if arguments.top_entropy_quantile < 1.0:
            refuse("top_entropy_quantile", "1.0, a second mask changes the count", reason)
    parallelism = arguments.parallelism_config
    if token_recipe.attention and getattr(parallelism, "tp_enabled", False):
        refuse(
            "parallelism_config",
            "without tensor parallelism",
            "Each rank sees only its own heads there, and the head average needs all of them.",
        )
