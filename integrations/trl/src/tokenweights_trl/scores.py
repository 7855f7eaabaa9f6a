"""Where the scores of a rollout batch come from: a forward pass, or the generation itself."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tokenweights.capture import CapturedAttention, capture_attention
from tokenweights.recipes import Recipe
from torch import Tensor, nn


@contextmanager
def forward_scores(
    model: nn.Module,
    attention_mask: Tensor,
    *,
    recipe: Recipe,
    layers: tuple[int, ...],
    response_length: int,
) -> Iterator[list[Tensor]]:
    """A context in which forward passes over prompt and response leave scores behind.

    The passes run all rows at once or in consecutive chunks of rows. The queries and keys of a
    chunk become entropies at once and are dropped.

    Args:
        model: The module whose attention layers run.
        attention_mask: True at real tokens of prompt and response, `batch position`.
        recipe: The entropy's kind and the row that stands for a token.
        layers: Layers to read.
        response_length: Number of response positions, the last ones.

    Yields:
        A list that on exit holds the attention entropy of each response token (nats, `batch
        token`) for each layer.
    """
    rows_seen: Counter[int] = Counter()

    def entropy(captured: CapturedAttention) -> Tensor:
        start = rows_seen[captured.layer]
        rows_seen[captured.layer] += captured.query.shape[0]
        return _entropy(captured, attention_mask[start : rows_seen[captured.layer]], recipe)

    scores: list[Tensor] = []
    # The row that decides the first response token is the last row of the prompt.
    with capture_attention(model, layers, rows=response_length + 1, reduce=entropy) as capture:
        yield scores
    for layer in layers:
        entropies = torch.cat(capture.calls[layer])
        scores.append(recipe.aligned(entropies, response_length=response_length))


@contextmanager
def generation_scores(
    model: nn.Module,
    prompt_lengths: Tensor,
    *,
    recipe: Recipe,
    layers: tuple[int, ...],
    prompt_width: int,
) -> Iterator[list[Tensor]]:
    """A context in which `model.generate` on left-padded prompts leaves scores behind.

    In decoding over a growing cache, the query of each forward pass is the row that decides the
    next token: the passes that generate already hold every deciding row.

    Args:
        model: The module that generates.
        prompt_lengths: Prompt tokens of each row, `batch`.
        recipe: The entropy's kind.
        layers: Layers to read.
        prompt_width: Width of the padded prompts.

    Yields:
        A list that on exit holds the attention entropy of each generated token (nats, `batch step`)
        for each layer. It stays empty where the passes were not one token a step over a cache that
        grows by one key (sliding or static caches, beams, assisted decoding).
    """
    padding = (prompt_width - prompt_lengths)[:, None]

    def entropy(captured: CapturedAttention) -> tuple[int, Tensor | None]:
        keys = captured.key.shape[2]
        if captured.query.shape[0] != len(padding):
            return -1, None
        key_mask = torch.arange(keys, device=padding.device) >= padding
        return keys, _entropy(captured, key_mask, recipe)

    scores: list[Tensor] = []
    with capture_attention(model, layers, rows=1, reduce=entropy) as capture:
        yield scores
    calls: list[list[Any]] = [capture.calls[layer] for layer in layers]
    steps = len(calls[0])
    growing = list(range(prompt_width, prompt_width + steps))
    if steps and all([keys for keys, _ in row] == growing for row in calls):
        scores.extend(torch.cat([entropies for _, entropies in row], dim=1) for row in calls)


def _entropy(captured: CapturedAttention, key_mask: Tensor, recipe: Recipe) -> Tensor:
    return captured.entropy(
        key_mask=key_mask,
        kind=recipe.entropy_kind,
        top_k=recipe.top_k,
        fixed_k=recipe.fixed_k,
    )
