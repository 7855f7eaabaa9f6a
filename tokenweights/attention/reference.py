"""The specification: every statistic from the full attention matrix, in float64.

Nothing here is fast. Read it to know what the other files must compute.
"""

import math

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights.attention.checks import check_total_mass
from tokenweights.attention.statistics import Logits, Request


def visible_keys(
    key_mask: Bool[Tensor, "batch key"], *, queries: int, causal: bool, window: int | None
) -> Bool[Tensor, "batch query key"]:
    """True where a query, one of the last `queries` positions, sees a key."""
    position = key_mask.cumsum(1) - 1  # counts real tokens, so padding shifts nothing
    asked = slice(key_mask.shape[1] - queries, None)
    distance = position[:, asked, None] - position[:, None, :]
    visible = key_mask[:, asked, None] & key_mask[:, None, :]
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance < min(window, key_mask.shape[1])
    return visible


def attention_logits(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    visible: Bool[Tensor, "batch query key"],
    logits: Logits,
) -> Float[Tensor, "batch heads query key"]:
    """Scaled and capped inner products; -inf where a query does not see a key."""
    group = query.shape[1] // key.shape[1]
    key = repeat(key.double(), "b kv k d -> b (kv group) k d", group=group)
    score = query.double() @ key.transpose(2, 3) * logits.scale
    if logits.softcap is not None:
        score = logits.softcap * torch.tanh(score / logits.softcap)
    return score.masked_fill(~visible[:, None], -torch.inf)


def denominators(
    score: Float[Tensor, "batch heads query key"], sinks: Float[Tensor, " heads"] | None
) -> Float[Tensor, "batch heads query"]:
    """Log-sum-exp over the visible keys, and the sink if there is one."""
    lse = score.logsumexp(-1)
    return lse if sinks is None else torch.logaddexp(lse, sinks.double()[:, None])


def entropy(log_weights: Float[Tensor, "*row key"]) -> Float[Tensor, "*row"]:
    """Shannon entropy in nats of the rows divided by their sums; 0 for an empty row."""
    log_share = log_weights - log_weights.logsumexp(-1, keepdim=True)
    log_share = log_share.masked_fill(log_weights == -torch.inf, 0.0)
    share = log_share.exp().masked_fill(log_weights == -torch.inf, 0.0)
    return -(share * log_share).sum(-1)


def reference_statistics(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    request: Request,
    logits: Logits,
    *,
    key_mask: Bool[Tensor, "batch key"] | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    per_head: bool = False,
    lse: Float[Tensor, "batch heads query"] | None = None,
    function: str = "attention_statistics",
) -> dict[str, Tensor]:
    """Every requested statistic, as `batch heads query`, of the mean distribution or per head.

    A given `lse` is not used, but it is refused, in the name of `function`, where it is another.
    """
    queries = query.shape[2]
    if key_mask is None:
        key_mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    visible = visible_keys(key_mask, queries=queries, causal=logits.causal, window=logits.window)
    score = attention_logits(query, key, visible, logits)
    denominator = denominators(score, sinks)
    if lse is not None:
        total = (denominator - lse.double()).exp()
        total = total if per_head else total.mean(1, keepdim=True)
        check_total_mass(function, total.where(visible.any(-1)[:, None], 1.0))
    # A padded query sees nothing: its row would be -inf - -inf.
    log_weights = (score - denominator[..., None]).masked_fill(~visible[:, None], -torch.inf)
    if not per_head:
        heads = query.shape[1]
        log_weights = log_weights.logsumexp(1, keepdim=True) - math.log(heads)
    seen, real = visible[:, None], visible.any(-1)[:, None]
    row_mass = log_weights.logsumexp(-1)
    # In logarithms, since a sink may leave the keys less than a number can hold.
    share = (log_weights - row_mass.where(real, 0.0)[..., None]).exp()
    count = visible.sum(-1)[:, None]
    raw = entropy(log_weights)
    log_count = count.double().log()
    largest = log_weights.sort(dim=-1, descending=True).values
    first = seen & (seen.cumsum(-1) <= request.fixed_k)
    position = key_mask.cumsum(1) - 1
    asked = slice(key_mask.shape[1] - queries, None)
    distance = (position[:, asked, None] - position[:, None, :]).abs()[:, None]
    local = (share * (distance < request.local_window)).sum(-1)
    bound = request.distance_bound
    far = distance if bound is None else distance.clamp_max(bound)
    results = {
        "raw": raw,
        "normalized": torch.where(count > 1, raw / log_count.where(count > 1, 1.0), 0.0),
        "topk": entropy(largest[..., : request.top_k]),
        "fixed": entropy(log_weights.masked_fill(~first, -torch.inf)),
        "mean_distance": (share * far).sum(-1),
        "local_mass": local,
        "nonlocal_mass": torch.where(real, 1.0 - local, 0.0),
        "max_weight": share.amax(-1),
        "row_mass": row_mass.exp(),
    }
    if "support_size" in request.kinds:
        # What the share leaves is compared with the sum of the smallest weights, which rounds less
        # than that of the largest.
        left_out = share.sort(dim=-1).values.cumsum(-1)
        sizes = [
            torch.where(real, share.shape[-1] - (left_out <= 1.0 - mass).sum(-1), 0).clamp_min(1)
            if mass < 1
            else count.expand_as(raw)
            for mass in request.support_mass
        ]
        size = torch.stack([torch.minimum(s, count.expand_as(s)) for s in sizes], dim=-1)
        results["support_size"] = size
    return {kind: results[kind] for kind in request.kinds}
