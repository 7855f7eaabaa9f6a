"""The public functions of columns: how much later queries look back at each key."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._typing import typed
from tokenweights.attention.dispatch import WORKSPACE_BYTES, Backend
from tokenweights.attention.received import Horizon, Received, Reduction, check_received
from tokenweights.attention.statistics import Request, layer_logits
from tokenweights.attention.sweeps import SomeHeads, packed_statistics, padded_statistics


@typed
@torch.no_grad()
def attention_received(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    *,
    horizon: Horizon = (None, None),
    reduction: Reduction = "mean",
    rows: Bool[Tensor, "batch query"] | None = None,
    heads: SomeHeads = "mean_distribution",
    scale: float | None = None,
    causal: bool = True,
    key_mask: Bool[Tensor, "batch key"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    lse: Float[Tensor, "batch heads query"] | None = None,
    backend: Backend = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Float[Tensor, "batch key"] | Float[Tensor, "batch heads key"]:
    r"""Attention that every key gets from later queries, `batch key`, as a share of a query's 1.

    The mean, sum or maximum over $t$ of $a_{t,s}$, the attention probability averaged over heads,
    over the queries at distances $t - s$ from `first` to `last`; a sink keeps its share. A key near
    the end has fewer such queries, and the mean is over those there are, whether a sliding window
    lets them see the key or not. A key without one, and a padded one, receives 0. Sums over
    all keys are compared with the mass of the rows at every call. No gradient, accuracy as
    `attention_entropy`. Memory is that of `attention_entropy` and a few numbers per key.

    Args:
        query: As in `attention_entropy`.
        key: As in `attention_entropy`.
        horizon: Distances `(first, last)` of the queries that count, in real tokens; None for no
            bound. At distance 0 is a key's own query.
        reduction: `mean`, `sum` or `max` over these queries.
        rows: True at the queries that count, for example those of a response; None for all.
        heads: `mean_distribution` for the mean over all heads, numbers of query heads for the mean
            over these, `none` for `batch heads key`.
        scale: As in `attention_entropy`.
        causal: As in `attention_entropy`.
        key_mask: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: As in `attention_entropy`; the weights are not renormalized here.
        lse: As in `attention_entropy`.
        backend: As in `attention_entropy`.
        workspace_bytes: As in `attention_entropy`.

    Returns:
        What each key receives, float32.

    Raises:
        TokenWeightsError: As `attention_entropy`, if `horizon` is empty, or if `heads` names one
            that there is not.

    Example:
        Equal scores spread the attention evenly, so the first key gets 1, 1/2 and 1/3:

        >>> query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
        >>> attention_received(query, key, reduction="sum")
        tensor([[1.8333, 0.8333, 0.3333]])
        >>> attention_received(query, key, horizon=(1, None))
        tensor([[0.4167, 0.3333, 0.0000]])
    """
    received = Received(horizon, reduction)
    check_received("attention_received", received)
    results = padded_statistics(
        "attention_received",
        query,
        key,
        Request((), received=received),
        layer_logits(query.shape[-1], scale, softcap, causal, window),
        key_mask=key_mask,
        sinks=sinks,
        lse=lse,
        heads=heads,
        backend=backend,
        workspace_bytes=workspace_bytes,
        rows=rows,
    )
    return results["received"]


@typed
@torch.no_grad()
def attention_received_varlen(
    query: Float[Tensor, "total_q heads dim"],
    key: Float[Tensor, "total_k kv_heads dim"],
    *,
    cu_seqlens_q: Int[Tensor, " boundary"],
    cu_seqlens_k: Int[Tensor, " boundary"],
    horizon: Horizon = (None, None),
    reduction: Reduction = "mean",
    rows: Bool[Tensor, " total_q"] | None = None,
    heads: SomeHeads = "mean_distribution",
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    lse: Float[Tensor, "heads total_q"] | None = None,
    backend: Backend = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Float[Tensor, " total_k"] | Float[Tensor, "heads total_k"]:
    r"""Attention that every key of a packed batch gets from later queries, ` total_k`.

    The same numbers as `attention_received` of each sequence alone: the mean, sum or maximum over
    $t$ of $a_{t,s}$. Sequences are cut as in `attention_entropy_varlen`. No gradient.

    Args:
        query: Queries of all sequences.
        key: Keys of all sequences.
        cu_seqlens_q: As in `attention_entropy_varlen`.
        cu_seqlens_k: As in `attention_entropy_varlen`.
        horizon: As in `attention_received`.
        reduction: As in `attention_received`.
        rows: As in `attention_received`.
        heads: As in `attention_received`.
        scale: As in `attention_entropy`.
        causal: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: As in `attention_received`.
        lse: As in `attention_entropy_varlen`.
        backend: As in `attention_entropy`.
        workspace_bytes: As in `attention_entropy`.

    Returns:
        What each key receives, float32.

    Raises:
        TokenWeightsError: As `attention_received` and `attention_entropy_varlen`.

    Example:
        >>> query, key = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8)
        >>> bounds = torch.tensor([0, 1, 4])
        >>> attention_received_varlen(
        ...     query, key, cu_seqlens_q=bounds, cu_seqlens_k=bounds, reduction="sum"
        ... )
        tensor([1.0000, 1.8333, 0.8333, 0.3333])
    """
    received = Received(horizon, reduction)
    check_received("attention_received_varlen", received)
    results = packed_statistics(
        "attention_received_varlen",
        query,
        key,
        Request((), received=received),
        layer_logits(query.shape[-1], scale, softcap, causal, window),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        sinks=sinks,
        lse=lse,
        heads=heads,
        backend=backend,
        workspace_bytes=workspace_bytes,
        rows=rows,
    )
    return results["received"]
