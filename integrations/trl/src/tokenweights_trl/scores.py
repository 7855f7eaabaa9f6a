"""Where the scores of a rollout batch come from: a forward pass, or the generation itself."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from tokenweights._errors import invalid
from tokenweights.capture import CapturedAttention, capture_attention
from tokenweights.capture.layers import learned_positions
from tokenweights.recipes.backward import AttentionReading, joined_readings
from tokenweights.recipes.signals import AttentionEntropy
from torch import Tensor, nn


@contextmanager
def forward_scores(
    model: nn.Module,
    attention_mask: Tensor,
    *,
    attention: AttentionEntropy | AttentionReading,
    response_length: int,
) -> Iterator[dict[int | str, Tensor]]:
    """A context in which forward passes over prompt and response leave scores behind.

    The passes run all rows at once or in consecutive chunks of rows. The queries and keys of a
    chunk become entropies at once and are dropped.

    Args:
        model: The module whose attention layers run.
        attention_mask: True at real tokens of prompt and response, `batch position`.
        attention: What is read, of which layers, and the row that stands for a token.
        response_length: Number of response positions, the last ones.

    Yields:
        A mapping that on exit holds the attention entropy of each response token (nats, `batch
        token`) for each layer, or what else is read by its name.
    """
    rows_seen: Counter[int] = Counter()

    def read(captured: CapturedAttention) -> dict[int | str, Tensor]:
        start = rows_seen[captured.layer]
        rows_seen[captured.layer] += captured.query.shape[0]
        rows = slice(start, rows_seen[captured.layer])
        return attention.readings(captured, key_mask=attention_mask[rows])

    scores: dict[int | str, Tensor] = {}
    layers = attention.layers or ()
    # The row that decides the first response token is the last row of the prompt.
    with capture_attention(model, layers, rows=response_length + 1, reduce=read) as capture:
        yield scores
    for name, values in joined_readings(capture.calls).items():
        scores[name] = attention.aligned(values, response_length=response_length)


def require_positions(model: nn.Module, attention_mask: Tensor) -> None:
    """Raises if a forward pass of TRL, which has no position ids, goes wrong under left padding.

    Args:
        model: The module whose forward pass it is.
        attention_mask: True at real tokens of prompt and response, `batch position`.

    Raises:
        TokenWeightsError: If there is padding and the model's positions are learned.
    """
    learned = None if attention_mask[:, 0].all() else learned_positions(model)
    if learned is not None:
        raise invalid(
            "TokenWeightsGRPOTrainer",
            "model",
            "without learned positions where a forward pass over padded prompts gives the scores",
            f"`{learned}`",
            "TRL gives such a pass no position ids. Let the generation give the scores: no vLLM, "
            "and gradient_accumulation_steps a multiple of steps_per_generation * num_iterations.",
        )


def require_own_tokens(model: nn.Module) -> None:
    """Raises if PEFT puts keys in front of the prompt, of which TRL's masks know nothing.

    Args:
        model: The module whose attention is to be read.

    Raises:
        TokenWeightsError: If prompt, prefix or P-tuning trains virtual tokens.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise invalid(
            "TokenWeightsGRPOTrainer",
            "model",
            "without virtual tokens where attention is read",
            f"one with a {type(config).__name__}",
            "Train a LoRA adapter, or choose a recipe that reads predictive entropy.",
        )


@contextmanager
def generation_scores(
    model: nn.Module,
    prompt_lengths: Tensor,
    *,
    attention: AttentionEntropy | AttentionReading,
    prompt_width: int,
) -> Iterator[dict[int | str, Tensor]]:
    """A context in which `model.generate` on left-padded prompts leaves scores behind.

    In decoding over a growing cache, the query of each forward pass is the row that decides the
    next token: the passes that generate already hold every deciding row. One query for each token
    is kept until generation ends, a small part of what the cache holds.

    Args:
        model: The module that generates.
        prompt_lengths: Prompt tokens of each row, `batch`.
        attention: The entropy's kind and the layers.
        prompt_width: Width of the padded prompts.

    Yields:
        A mapping that on exit holds the attention entropy of each generated token (nats, `batch
        step`) for each layer. It stays empty where the passes were not one token a step over a
        cache that grows by one key (sliding caches, beams, assisted decoding). A static cache is
        refused.
    """
    padding = (prompt_width - prompt_lengths)[:, None]
    latest: dict[int, CapturedAttention] = {}

    def query(captured: CapturedAttention) -> tuple[int, Tensor]:
        # The cache grows by appending, so its last state holds the keys of every step.
        latest[captured.layer] = captured
        return captured.key.shape[2], captured.query.clone()

    scores: dict[int | str, Tensor] = {}
    layers = attention.layers or ()
    with capture_attention(model, layers, rows=1, reduce=query) as capture:
        yield scores
    calls: list[list[tuple[int, Tensor]]] = [capture.calls[layer] for layer in layers]
    steps = len(calls[0])
    growing = list(range(prompt_width, prompt_width + steps))
    same_rows = all(part.shape[0] == len(padding) for row in calls for _, part in row)
    if not steps or not same_rows or any([keys for keys, _ in row] != growing for row in calls):
        return
    key_mask = torch.arange(growing[-1], device=padding.device) >= padding
    for layer, row in zip(layers, calls, strict=True):
        queries = torch.cat([part for _, part in row], dim=2)
        whole = replace(latest[layer], query=queries)
        scores |= attention.readings(whole, key_mask=key_mask)
