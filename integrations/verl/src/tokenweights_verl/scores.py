"""From tensors as VeRL holds them, rows of their own lengths, to the columns of a batch."""

from typing import Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from tokenweights.recipes import Recipe, RolloutBatch
from tokenweights.recipes.identity import label_numbers, text_numbers
from torch import Tensor
from verl.utils.config import omega_conf_to_dataclass

# The key of the signal that goes along with a batch whose attention is wanted.
PROBE = "attention_probe"
# The key of the output that answers it, by the name of what was read.
ENTROPY = "attention_entropy_{}"
ATTENTION = ("full_attention", "sliding_attention")
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

Nested = Any  # a jagged tensor; torch's own type does not know of its offsets


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
    text = omega_conf_to_dataclass(config.actor_rollout_ref.model).hf_config.get_text_config()
    depth = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or [ATTENTION[0]] * depth
    available = [layer for layer, kind in enumerate(kinds) if kind in ATTENTION]
    return recipe.placed(depth, available=available)


def response_scores(scores: Nested, response_mask: Nested, *, alignment: str) -> Tensor:
    """Scores of response tokens, `batch token`, out of nested scores of prompts and responses.

    Args:
        scores: Nested scores, each row a prompt and its response.
        response_mask: Nested mask, each row a response.
        alignment: Whose row stands for a token: the one `deciding` it, to its left, or its `own`.

    Returns:
        Scores, 0 beyond the end of a response.

    Example:
        >>> rows = torch.nested.as_nested_tensor([torch.arange(5.0)], layout=torch.jagged)
        >>> mask = torch.nested.as_nested_tensor([torch.ones(2)], layout=torch.jagged)
        >>> response_scores(rows, mask, alignment="deciding")
        tensor([[2., 3.]])
    """
    shift = 1 if alignment == "deciding" else 0
    lengths, ends = response_mask.offsets().diff().tolist(), scores.offsets()[1:].tolist()
    parts = zip((end - shift for end in ends), lengths, strict=True)
    rows = [scores.values()[end - length : end].float() for end, length in parts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def attention_columns(attention: Any, data: TensorDict) -> dict[int | str, Tensor]:
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
    read = {field: name for name, field in COLUMNS.items() if field in data.keys()}
    padded = data.select("response_mask", *read).to_padded_tensor()
    columns = {name: padded[field] for field, name in read.items()}
    columns |= {name: columns[name].float() for name in columns if name != "token_ids"}
    if "rewards" in columns:
        columns["rewards"] = columns["rewards"].sum(-1)
    if recipe.attention is not None:
        columns["attention"] = attention_columns(recipe.attention, data)
    return RolloutBatch(
        mask=padded["response_mask"].bool(),
        sample_ids=text_numbers(step, data["prompts"].unbind(), data["responses"].unbind()),
        prompt_ids=label_numbers(key.split("_")[0] for key in keys),
        **columns,
    )
