"""From tensors as VeRL holds them, rows of their own lengths, to scores and sample ids."""

import hashlib
from typing import Any

import torch
from omegaconf import DictConfig
from tokenweights.recipes import Recipe
from torch import Tensor
from verl.utils.config import omega_conf_to_dataclass

# The key of the recipe that goes along with a batch whose attention is wanted.
PROBE = "attention_probe"
# The key of the output that answers it, one for each probed layer.
ENTROPY = "attention_entropy_{}"
ATTENTION = ("full_attention", "sliding_attention")

Nested = Any  # a jagged tensor; torch's own type does not know of its offsets


def attention_layers(recipe: Recipe, config: DictConfig) -> tuple[int, ...]:
    """The layers that a recipe reads in the actor's model, of those that have attention.

    Args:
        recipe: A recipe.
        config: VeRL's whole configuration.

    Returns:
        Numbers of layers, from 0; none if the recipe's signal is not attention entropy.

    Raises:
        TokenWeightsError: If the model does not have one of the recipe's layers.
    """
    if recipe.signal != "attention_entropy":
        return ()
    text = omega_conf_to_dataclass(config.actor_rollout_ref.model).hf_config.get_text_config()
    depth = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or [ATTENTION[0]] * depth
    available = [layer for layer, kind in enumerate(kinds) if kind in ATTENTION]
    return recipe.probe_layers(depth, available=available)


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
