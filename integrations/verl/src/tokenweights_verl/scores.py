"""From tensors as VeRL holds them, rows of their own lengths, to the columns of a batch."""

import hashlib
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from tokenweights.recipes import Recipe, RolloutBatch
from torch import Tensor
from verl.utils.config import omega_conf_to_dataclass

# The key of the signal that goes along with a batch whose attention is wanted.
PROBE = "attention_probe"
# The key of the output that answers it, one for each probed layer.
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


def sample_ids(step: int, prompts: Nested, responses: Nested) -> Tensor:
    """A number in [0, 2^48) for each response that stays with it however the batch is ordered.

    It follows from step and text, so random rules give the same masks on any number of ranks.

    Args:
        step: Training step.
        prompts: Nested token ids.
        responses: Nested token ids; equal ones are counted.

    Returns:
        Numbers, ` batch`.
    """
    seen: dict[str, int] = {}
    numbers = []
    for prompt, response in zip(prompts.unbind(), responses.unbind(), strict=True):
        text = f"{step} {prompt.tolist()} {response.tolist()}"
        seen[text] = seen.get(text, 0) + 1
        digest = hashlib.sha256(f"{text} {seen[text]}".encode()).digest()
        numbers.append(int.from_bytes(digest[:6], "big"))
    return torch.tensor(numbers)


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
    floats = {name: column.float() for name, column in columns.items() if name != "token_ids"}
    if "rewards" in floats:
        floats["rewards"] = floats["rewards"].sum(-1)
    lengths, prompts = data["response_mask"], [key.split("_")[0] for key in keys]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    layers = {}
    for place, layer in enumerate(recipe.layers):
        scores = data[ENTROPY.format(place)]
        alignment = recipe.attention.alignment
        layers[layer] = response_scores(scores, lengths, alignment=alignment)
    return RolloutBatch(
        mask=padded["response_mask"].bool(),
        sample_ids=sample_ids(step, data["prompts"], data["responses"]),
        prompt_ids=torch.tensor([numbers[prompt] for prompt in prompts]),
        attention=layers or None,
        **columns | floats,
    )
