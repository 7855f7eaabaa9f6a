"""The public functions of queries and keys: one sweep, any number of statistics."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._typing import typed
from tokenweights.attention.dispatch import WORKSPACE_BYTES, Backend
from tokenweights.attention.received import Received, check_received
from tokenweights.attention.statistics import (
    STATISTIC_KINDS,
    AttentionStatistics,
    EntropyKind,
    Heads,
    Request,
    StatisticKind,
    layer_logits,
)
from tokenweights.attention.sweeps import packed_statistics, padded_statistics


@typed
@torch.no_grad()
def attention_entropy(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    *,
    kind: EntropyKind = "normalized",
    top_k: int = 256,
    fixed_k: int = 256,
    scale: float | None = None,
    causal: bool = True,
    key_mask: Bool[Tensor, "batch key"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    lse: Float[Tensor, "batch heads query"] | None = None,
    heads: Heads = "mean_distribution",
    backend: Backend = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Float[Tensor, "batch query"] | Float[Tensor, "batch heads query"]:
    r"""Entropy of the head-averaged attention distribution of every query, `batch query`, in nats.

    With $a_{t,j}$ the attention probability of key $j$, averaged over the heads of the layer, and
    $N_t$ the number of keys that query $t$ sees (Eq. 2, 12-15):

    - `raw`: $H_t = -\sum_j a_{t,j} \log a_{t,j}$, in $[0, \log N_t]$;
    - `normalized`: $H_t / \log N_t$, in $[0, 1]$, and 0 where $N_t = 1$;
    - `topk`: the entropy of the `top_k` largest weights, renormalized;
    - `fixed`: the entropy of the first `fixed_k` visible keys, renormalized.

    The queries are the last positions of the keys. Positions count real tokens, so every layout of
    the same tokens gives the same numbers; a query at a padded position has value 0, and padded
    positions are never read. Softmax and sums are float32 whatever the input's type, and so are
    products, which follow torch's float32 matmul precision; where queries and keys are long enough
    for scores above 64 (1024 on an accelerator), products are float64. Results are right to 1e-5 of
    float64 (to 1e-4 between these two bounds). The result carries no gradient. Memory is a block of
    rows by the number of keys (a float32 copy of half-precision inputs aside).

    Args:
        query: Queries after rotary embedding, as the attention layer uses them.
        key: Keys of all positions. With fewer heads than `query` each serves a group of queries.
        kind: Which entropy.
        top_k: Number of weights kept by `topk`; more than $N_t$ keeps all.
        fixed_k: Number of positions kept by `fixed`; more than $N_t$ keeps all.
        scale: Factor on the inner products; `dim ** -0.5` if None.
        causal: Whether keys after the query are hidden.
        key_mask: True at real keys; None if all are. A query is real where its own key is.
        window: Number of keys a query sees, itself included (sliding-window attention).
        softcap: Bounds the scaled scores: `softcap * tanh(score / softcap)`.
        sinks: One extra logit per head in the denominator, -inf for none. The averaged weights are
            then renormalized over the visible keys.
        lse: Natural log of the softmax denominators of these logits, sinks included, as flash
            attention returns it. Saves work, above all for `fixed`, which then reads `fixed_k` keys
            per query. It is verified: the weights of each row must sum to one within 1e-3 (for
            `fixed` alone this is tested on the last query of each row). `reference` ignores it, and
            so does `chunked` where it is float32 and above 256, too coarse to be of use.
        heads: `mean_distribution` averages probabilities, as the paper does; `mean_entropy`
            averages the entropies of the heads; `none` returns `batch heads query`.
        backend: `triton` (NVIDIA GPUs, compute capability 8.0 or above), `chunked` (torch, any
            device), `reference` (dense, float64 result), or `auto`: `triton` where it can serve,
            else `chunked`.
        workspace_bytes: Bound on the weights that are held at a time.

    Returns:
        The entropies, float32.

    Raises:
        TokenWeightsError: If shapes or parameters do not fit together, if `query` or `key` is not
            finite at real positions, if scores or `sinks` may exceed 2**33, which float64 does not
            resolve, if `lse` belongs to other queries and keys, or if `backend` cannot serve the
            request.

    Example:
        Equal scores spread the attention evenly over all visible keys:

        >>> import torch
        >>> query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
        >>> attention_entropy(query, key)
        tensor([[0., 1., 1.]])
        >>> attention_entropy(query, key, kind="raw")
        tensor([[0.0000, 0.6931, 1.0986]])
    """
    results = padded_statistics(
        "attention_entropy",
        query,
        key,
        Request((kind,), top_k, fixed_k),
        layer_logits(query.shape[-1], scale, softcap, causal, window),
        key_mask=key_mask,
        sinks=sinks,
        lse=lse,
        heads=heads,
        backend=backend,
        workspace_bytes=workspace_bytes,
    )
    return results[kind]


@typed
@torch.no_grad()
def attention_entropy_varlen(
    query: Float[Tensor, "total_q heads dim"],
    key: Float[Tensor, "total_k kv_heads dim"],
    *,
    cu_seqlens_q: Int[Tensor, " boundary"],
    cu_seqlens_k: Int[Tensor, " boundary"],
    kind: EntropyKind = "normalized",
    top_k: int = 256,
    fixed_k: int = 256,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    lse: Float[Tensor, "heads total_q"] | None = None,
    heads: Heads = "mean_distribution",
    backend: Backend = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Float[Tensor, " total_q"] | Float[Tensor, "heads total_q"]:
    r"""Attention entropy of every query of a packed batch, ` total_q`, in nats.

    The same numbers as `attention_entropy` of each sequence alone (Eq. 2, 12-15). Sequence `i` has
    the queries `cu_seqlens_q[i] : cu_seqlens_q[i + 1]` and the keys
    `cu_seqlens_k[i] : cu_seqlens_k[i + 1]`; its queries are the last positions of its keys. The
    range is that of `attention_entropy`. No gradient. Memory is a block of rows by the keys of the
    longest sequence.

    Args:
        query: Queries of all sequences, one after another.
        key: Keys of all sequences, one after another.
        cu_seqlens_q: Cumulative query lengths, with a leading zero.
        cu_seqlens_k: Cumulative key lengths, with a leading zero.
        kind: As in `attention_entropy`.
        top_k: As in `attention_entropy`.
        fixed_k: As in `attention_entropy`.
        scale: As in `attention_entropy`.
        causal: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: As in `attention_entropy`.
        lse: As in `attention_entropy`, laid out `heads total_q` as flash attention returns it.
        heads: As in `attention_entropy`; `none` returns `heads total_q`.
        backend: As in `attention_entropy`.
        workspace_bytes: As in `attention_entropy`.

    Returns:
        The entropies, float32.

    Raises:
        TokenWeightsError: As `attention_entropy`, or if the cumulative lengths do not cut the
            packed tokens into sequences with at least as many keys as queries.

    Example:
        >>> import torch
        >>> query, key = torch.zeros(4, 4, 8), torch.zeros(5, 2, 8)
        >>> attention_entropy_varlen(
        ...     query,
        ...     key,
        ...     cu_seqlens_q=torch.tensor([0, 2, 4]),
        ...     cu_seqlens_k=torch.tensor([0, 2, 5]),
        ...     kind="raw",
        ... )
        tensor([0.0000, 0.6931, 0.6931, 1.0986])
    """
    results = packed_statistics(
        "attention_entropy_varlen",
        query,
        key,
        Request((kind,), top_k, fixed_k),
        layer_logits(query.shape[-1], scale, softcap, causal, window),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        sinks=sinks,
        lse=lse,
        heads=heads,
        backend=backend,
        workspace_bytes=workspace_bytes,
    )
    return results[kind]


@typed
@torch.no_grad()
def attention_statistics(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    *,
    kinds: Sequence[StatisticKind] = STATISTIC_KINDS,
    top_k: int = 256,
    fixed_k: int = 256,
    support_mass: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    local_window: int = 128,
    distance_bound: int | None = None,
    received: Received | None = None,
    rows: Bool[Tensor, "batch query"] | None = None,
    scale: float | None = None,
    causal: bool = True,
    key_mask: Bool[Tensor, "batch key"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    lse: Float[Tensor, "batch heads query"] | None = None,
    heads: Heads = "mean_distribution",
    backend: Backend = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> AttentionStatistics:
    r"""Statistics of the attention distribution of every query, each `batch query`, in one sweep.

    Next to the entropies of `attention_entropy` (Eq. 12-15, nats): `support_size`, the least number
    of keys whose weights sum to a share of the visible mass (`batch query mass`);
    `mean_distance` $\sum_j a_{t,j} \min(|t - j|, W)$ in real tokens; `local_mass`, the share of
    mass at distances below `local_window`, and `nonlocal_mass`, the rest; `max_weight`; and
    `row_mass`, the sum of the weights before renormalization. Ranges: support sizes in $[1, N_t]$,
    shares in $[0, 1]$. A support size may be off by one where the cumulative mass meets the
    threshold within float32 rounding; all of the mass is held by all visible keys. Only what is
    asked for is computed; `support_size` and `topk` cost most, as they order the weights. What each
    key receives (`batch key`) costs next to nothing beside any of them. No gradient. Memory as
    in `attention_entropy`.

    Args:
        query: As in `attention_entropy`.
        key: As in `attention_entropy`.
        kinds: Which statistics; all by default.
        top_k: As in `attention_entropy`.
        fixed_k: As in `attention_entropy`.
        support_mass: Shares of the visible mass, in (0, 1], one column of `support_size` each.
        local_window: Keys at a smaller distance than this count as local.
        distance_bound: The largest distance $W$ that a pair counts with; None for no bound.
        received: What each key receives, in the same sweep; see `attention_received`.
        rows: As in `attention_received`; of the queries' own statistics all are computed.
        scale: As in `attention_entropy`.
        causal: As in `attention_entropy`.
        key_mask: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: As in `attention_entropy`.
        lse: As in `attention_entropy`.
        heads: As in `attention_entropy`; `none` gives every field a head axis, `mean_entropy`
            is for entropies only.
        backend: As in `attention_entropy`.
        workspace_bytes: As in `attention_entropy`.

    Returns:
        The record of the statistics; fields that were not asked for are None.

    Raises:
        TokenWeightsError: As `attention_entropy`, or if a statistic other than an entropy is asked
            for with `heads="mean_entropy"`.

    Example:
        >>> import torch
        >>> query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
        >>> kinds = ("support_size", "mean_distance")
        >>> statistics = attention_statistics(query, key, kinds=kinds, support_mass=(0.5, 1.0))
        >>> statistics.support_size.tolist()
        [[[1, 1], [1, 2], [2, 3]]]
        >>> statistics.mean_distance
        tensor([[0.0000, 0.5000, 1.0000]])
        >>> statistics.raw is None
        True
    """
    if received is not None:
        check_received("attention_statistics", received)
    results = padded_statistics(
        "attention_statistics",
        query,
        key,
        Request(
            tuple(kinds),
            top_k,
            fixed_k,
            tuple(support_mass),
            local_window,
            distance_bound,
            received,
        ),
        layer_logits(query.shape[-1], scale, softcap, causal, window),
        key_mask=key_mask,
        sinks=sinks,
        lse=lse,
        heads=heads,
        backend=backend,
        workspace_bytes=workspace_bytes,
        rows=rows,
    )
    return AttentionStatistics(**results)
