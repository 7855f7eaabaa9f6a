"""Attention received as the specification has it: column sums of the full matrix, in float64."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights.attention.received import Received
from tokenweights.attention.reference import attention_logits, denominators, visible_keys
from tokenweights.attention.statistics import Logits


def reference_received(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    received: Received,
    logits: Logits,
    *,
    key_mask: Bool[Tensor, "batch key"] | None,
    sinks: Float[Tensor, " heads"] | None,
    per_head: bool,
    rows: Bool[Tensor, "batch query"] | None,
) -> tuple[Float[Tensor, "batch heads key"], Float[Tensor, ""], Float[Tensor, ""]]:
    """Totals of every key, and the mass that they sum to along columns and along rows."""
    queries = query.shape[2]
    if key_mask is None:
        key_mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    visible = visible_keys(key_mask, queries=queries, causal=logits.causal, window=logits.window)
    score = attention_logits(query, key, visible, logits)
    weights = (score - denominators(score, sinks)[..., None]).exp()
    position = key_mask.cumsum(1) - 1
    asked = slice(key_mask.shape[1] - queries, None)
    distance = position[:, asked, None] - position[:, None, :]
    counted, (first, last) = visible, received.horizon
    if first is not None:
        counted = counted & (distance >= first)
    if last is not None:
        counted = counted & (distance <= last)
    if rows is not None:
        counted = counted & rows[:, :, None]
    # A padded query sees nothing: its row is -inf - -inf.
    weights = torch.where(counted[:, None], weights, 0.0)
    weights = weights if per_head else weights.mean(1, keepdim=True)
    totals = weights.amax(2) if received.reduction == "max" else weights.sum(2)
    return totals, weights.sum(2).sum(), weights.sum(3).sum()
