"""From jagged tensors, rows of their own lengths as trainers of packed batches hold them."""

from typing import Any

import torch
from torch import Tensor

from tokenweights.recipes.recipe import Recipe

Nested = Any  # a jagged tensor; torch's own type does not know of its offsets
ATTENTION = ("full_attention", "sliding_attention")


def placed_on_config(recipe: Recipe, config: Any) -> Recipe:
    """A recipe with its layers numbered for a model of which there is only the configuration.

    Args:
        recipe: A recipe.
        config: The configuration of a transformers model.

    Returns:
        The recipe; as it is if it reads no attention.

    Raises:
        TokenWeightsError: If the model does not have one of the recipe's layers.
    """
    if recipe.attention is None:
        return recipe
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or [ATTENTION[0]] * text.num_hidden_layers
    available = [layer for layer, kind in enumerate(kinds) if kind in ATTENTION]
    return recipe.placed(text.num_hidden_layers, available=available)


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
