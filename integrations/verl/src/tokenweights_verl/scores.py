"""From tensors as VeRL holds them, rows of their own lengths, to the columns of a batch."""

from omegaconf import DictConfig
from tensordict import TensorDict
from tokenweights import Recipe, RolloutBatch, adapters
from tokenweights.adapters import Attention, label_numbers, response_scores, text_numbers
from torch import Tensor
from verl.utils.config import omega_conf_to_dataclass

# The key of the signal that goes along with a batch whose attention is wanted.
PROBE = "attention_probe"
# The key of the output that answers it, by the name of what was read.
ENTROPY = "attention_entropy_{}"
# VeRL's names for the columns of a rollout batch.
COLUMNS = {
    "token_ids": "responses",
    "advantages": "advantages",
    "log_probs": "old_log_probs",
    "predictive_entropy": "entropy",
    "rewards": "rm_scores",
    "sampler_log_probs": "rollout_log_probs",
    "reference_log_probs": "ref_log_prob",
}
# What every batch holds: its rows, and what a token record shows.
FIELDS = ("response_mask", "prompts", *list(COLUMNS.values())[:4])


def placed(recipe: Recipe, config: DictConfig) -> Recipe:
    """A recipe with its layers numbered for the actor's model, of those that have attention.

    Args:
        recipe: A recipe.
        config: VeRL's whole configuration.

    Returns:
        The recipe; as it is if it reads no attention.

    Raises:
        TokenWeightsError: If the model does not have one of the recipe's layers.
    """
    if recipe.attention is None:
        return recipe
    model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    return adapters.placed_on_config(recipe, model.hf_config)


def attention_columns(attention: Attention, data: TensorDict) -> dict[int | str, Tensor]:
    """What was read of attention for response tokens, `batch token`, out of a pass's outputs.

    Args:
        attention: What was read: `Recipe.attention` with its layers numbered.
        data: The outputs, one for each name, and `response_mask`.

    Returns:
        Columns by name, entropies by the number of the layer.
    """
    row = {"response_mask": data["response_mask"], "alignment": attention.alignment}
    return {n: response_scores(data[ENTROPY.format(n)], **row) for n in attention.names}


def rollout_batch(recipe: Recipe, step: int, keys: list[str], data: TensorDict) -> RolloutBatch:
    """A rollout batch with the columns that a recipe reads.

    Args:
        recipe: A recipe with its layers numbered.
        step: Training step.
        keys: VeRL's keys of the rows: prompt, response and turn, with "_" between them.
        data: VeRL's fields of the rows.

    Returns:
        The batch, padded on the right.
    """
    columns = adapters.padded_columns(data, {**COLUMNS, "mask": "response_mask"})
    if recipe.attention is not None:
        columns["attention"] = attention_columns(recipe.attention, data)
    return RolloutBatch(
        mask=columns.pop("mask").bool(),
        sample_ids=text_numbers(step, data["prompts"].unbind(), data["responses"].unbind()),
        prompt_ids=label_numbers(key.split("_")[0] for key in keys),
        **columns,
    )
