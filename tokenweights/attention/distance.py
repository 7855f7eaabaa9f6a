"""How far back queries look: the mean distance of their attention, each pair's up to a bound."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._typing import typed
from tokenweights.attention.checks import check_distance_bound
from tokenweights.attention.dispatch import WORKSPACE_BYTES, Backend
from tokenweights.attention.statistics import Request, layer_logits
from tokenweights.attention.sweeps import SomeHeads, padded_statistics


@typed
@torch.no_grad()
def attention_distance(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    *,
    bound: int | None = None,
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
) -> Float[Tensor, "batch query"] | Float[Tensor, "batch heads query"]:
    r"""Mean distance from every query to the keys it looks at, `batch query`, in real tokens.

    $\sum_j a_{t,j} \min(|t - j|, W)$ with $a_{t,j}$ the attention averaged over heads, renormalized
    over the visible keys, and $W$ the `bound`. `attention_statistics` computes it in one sweep with
    the entropy, as `mean_distance` with `distance_bound`. No gradient. Memory as in
    `attention_entropy`.

    Args:
        query: As in `attention_entropy`.
        key: As in `attention_entropy`.
        bound: The largest distance that a pair counts with; None for no bound.
        heads: `mean_distribution` for the mean over all heads, numbers of query heads for the mean
            over these, `none` for `batch heads query`.
        scale: As in `attention_entropy`.
        causal: As in `attention_entropy`.
        key_mask: As in `attention_entropy`.
        window: As in `attention_entropy`.
        softcap: As in `attention_entropy`.
        sinks: As in `attention_entropy`.
        lse: As in `attention_entropy`.
        backend: As in `attention_entropy`.
        workspace_bytes: As in `attention_entropy`.

    Returns:
        The distances, float32; 0 at padded queries.

    Raises:
        TokenWeightsError: As `attention_statistics`, or if `heads` names one that there is not.

    Example:
        >>> query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
        >>> attention_distance(query, key)
        tensor([[0.0000, 0.5000, 1.0000]])
        >>> attention_distance(query, key, bound=1)
        tensor([[0.0000, 0.5000, 0.6667]])
    """
    check_distance_bound("attention_distance", "bound", bound)
    results = padded_statistics(
        "attention_distance",
        query,
        key,
        Request(("mean_distance",), distance_bound=bound),
        layer_logits(query.shape[-1], scale, softcap, causal, window),
        key_mask=key_mask,
        sinks=sinks,
        lse=lse,
        heads=heads,
        backend=backend,
        workspace_bytes=workspace_bytes,
    )
    return results["mean_distance"]
