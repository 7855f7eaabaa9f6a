"""The head-averaged attention distribution itself, for the few rows somebody wants to look at."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._typing import typed
from tokenweights.attention.checks import check_logits, check_padded
from tokenweights.attention.reference import attention_logits, denominators, visible_keys
from tokenweights.attention.statistics import Logits


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
    Computed in float64, one head at a time; the result and two float64 copies of it are all the
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
    logits = Logits(query.shape[-1] ** -0.5 if scale is None else scale, softcap, causal, window)
    check_padded("attention_weights", query, key, key_mask, None, sinks)
    check_logits("attention_weights", logits)
    batch, heads, queries, _ = query.shape
    if key_mask is None:
        key_mask = torch.ones(batch, key.shape[2], dtype=torch.bool, device=key.device)
    visible = visible_keys(key_mask, queries=queries, causal=causal, window=window)
    group = heads // key.shape[1]
    total = torch.zeros(visible.shape, dtype=torch.float64, device=key.device)
    for head in range(heads):
        own = slice(head // group, head // group + 1)
        sink = None if sinks is None else sinks[head : head + 1]
        one = query[:, head : head + 1]
        score = attention_logits(one, key[:, own], visible, logits)
        weights = (score - denominators(score, sink)[..., None]).exp()[:, 0]
        total += weights.masked_fill(~visible, 0.0)  # a padded query's row is not a number
    mass = total.sum(-1, keepdim=True)
    return (total / mass.where(mass > 0, 1.0)).float()
