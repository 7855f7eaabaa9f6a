"""The head-averaged attention distribution itself, for the few rows somebody wants to look at."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._typing import typed
from tokenweights.attention.checks import (
    check_batch_scores,
    check_finite,
    check_logits,
    check_padded,
)
from tokenweights.attention.layout import padded_batch
from tokenweights.attention.reference import attention_logits, denominators, visible_keys
from tokenweights.attention.statistics import layer_logits


@typed
@torch.no_grad()
def attention_weights(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    *,
    scale: float | None = None,
    causal: bool = True,
    key_mask: Bool[Tensor, "batch key"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch query key"]:
    r"""Attention weights averaged over heads, `batch query key`; each row sums to one (Section 2).

    $\bar a_{t,j}$, the distribution that `attention_entropy` measures, in float32: shares of the
    visible mass, 0 where a query does not look, and an empty row for a padded query. Detached.
    Computed in float64, one head at a time; the result and a few float64 copies of it are all the
    memory. Pass few queries: they are the last positions of `key`, so rows further up are had by
    cutting both.

    Args:
        query: As in `attention_entropy`.
        key: As in `attention_entropy`.
        scale: As in `attention_entropy`.
        causal: As in `attention_entropy`.
        key_mask: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: As in `attention_entropy`.

    Returns:
        One row of weights for each query.

    Raises:
        TokenWeightsError: As `attention_entropy`.

    Example:
        >>> attention_weights(torch.zeros(1, 2, 2, 4), torch.zeros(1, 1, 2, 4))
        tensor([[[1.0000, 0.0000],
                 [0.5000, 0.5000]]])
    """
    function = "attention_weights"
    logits = layer_logits(query.shape[-1], scale, softcap, causal, window)
    check_padded(function, query, key, key_mask, None, sinks)
    check_logits(function, logits)
    sequences = padded_batch(query, key, key_mask, None)
    check_finite(function, sequences, sinks)
    check_batch_scores(function, sequences, logits.scale)
    batch, heads, queries, _ = query.shape
    logits = logits.bounded(key.shape[2])
    if key_mask is None:
        key_mask = torch.ones(batch, key.shape[2], dtype=torch.bool, device=key.device)
    visible = visible_keys(key_mask, queries=queries, causal=causal, window=logits.window)
    group = heads // key.shape[1]
    total = torch.full(visible.shape, -torch.inf, dtype=torch.float64, device=key.device)
    for head in range(heads):
        own = slice(head // group, head // group + 1)
        sink = None if sinks is None else sinks[head : head + 1]
        one = query[:, head : head + 1]
        score = attention_logits(one, key[:, own], visible, logits)
        log_weights = (score - denominators(score, sink)[..., None])[:, 0]
        # A padded query's row is not a number. Sums in logarithms, since a sink may leave the keys
        # less than a number can hold.
        total = torch.logaddexp(total, log_weights.masked_fill_(~visible, -torch.inf))
    weights = (total - total.logsumexp(-1, keepdim=True)).exp()
    return weights.masked_fill(~visible, 0.0).float()
