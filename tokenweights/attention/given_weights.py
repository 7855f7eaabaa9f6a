"""Attention entropy from a given attention matrix."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.attention.checks import (
    check_logits,
    check_positions,
    check_request,
    check_shape,
)
from tokenweights.attention.layout import token_slots
from tokenweights.attention.results import empty_results, joined, over_heads, write_results
from tokenweights.attention.rows import is_first_key, row_blocks, row_statistics
from tokenweights.attention.statistics import EntropyKind, Heads, Logits, Request
from tokenweights.masked import sum_dtype

ROWS = 128


@typed
@torch.no_grad()
def attention_entropy_from_weights(
    weights: Float[Tensor, "batch heads query key"],
    *,
    kind: EntropyKind = "normalized",
    top_k: int = 256,
    fixed_k: int = 256,
    causal: bool = True,
    key_mask: Bool[Tensor, "batch key"] | None = None,
    window: int | None = None,
    heads: Heads = "mean_distribution",
) -> Float[Tensor, "batch query"] | Float[Tensor, "batch heads query"]:
    r"""Attention entropy of every query from a given attention matrix, `batch query`, in nats.

    The entropies of `attention_entropy` (Eq. 2, 12-15) for a model that returns its attention
    probabilities. Which keys a query sees, and so $N_t$, follows from the same arguments; weights
    outside are ignored, and the averaged weights are renormalized over the visible keys. No
    gradient. Memory beyond the matrix itself is a block of its rows.

    Args:
        weights: Non-negative attention weights; the queries are the last positions of the keys.
        kind: As in `attention_entropy`.
        top_k: As in `attention_entropy`.
        fixed_k: As in `attention_entropy`.
        causal: As in `attention_entropy`.
        key_mask: As in `attention_entropy`.
        window: As in `attention_entropy`.
        heads: As in `attention_entropy`.

    Returns:
        The entropies, float32; 0 at padded queries.

    Raises:
        TokenWeightsError: If a visible weight is negative or not finite, or if a real query has no
            weight on any visible key (for `fixed`, on the first `fixed_k` of them).

    Example:
        >>> import torch
        >>> weights = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 2, 2, 2)
        >>> attention_entropy_from_weights(weights)
        tensor([[0., 1.]])
    """
    function = "attention_entropy_from_weights"
    batch, all_heads, queries, keys = weights.shape
    request = Request((kind,), top_k, fixed_k)
    logits = Logits(scale=1.0, causal=causal, window=window)
    check_request(function, request, heads)
    check_logits(function, logits)
    request, logits = request.bounded(keys), logits.bounded(keys)
    if not all_heads:
        hint = "Pass the weights of one layer."
        raise invalid(function, "weights", "to have at least one head", all_heads, hint)
    check_positions(function, queries, keys)
    check_shape(function, "key_mask", key_mask, (batch, keys))
    wide = sum_dtype(weights.dtype)
    shares = heads == "mean_distribution"
    results = empty_results(request, (batch, 1 if shares else all_heads, queries), weights)
    for slots in token_slots(batch, queries, keys, key_mask):
        own = weights[slots.row][:, slots.query][:, :, slots.key]
        parts = []
        for taken, block in row_blocks(
            queries=own.shape[1], keys=own.shape[2], rows=ROWS, logits=logits, device=own.device
        ):
            part = own[:, taken, block.key_slice].to(wide, copy=True)
            for columns, hidden in block.hidden:
                part[..., columns].masked_fill_(hidden, 0.0)
            _check_weights(function, part)
            if kind == "fixed":
                part.masked_fill_(~is_first_key(block, request.fixed_k), 0.0)
            # As shares of the largest, so that the smallest numbers of a type do, and the largest.
            largest = part.amax((0, 2) if shares else 2, keepdim=True)
            if not bool((largest > 0).all()):
                condition = f"to have mass on the first {request.fixed_k} visible keys of every row"
                hint = "The fixed-position entropy is undefined there; compute it from q and k."
                raise invalid(function, "weights", condition, "a row with none", hint)
            part = part.div_(largest).float()
            part = part.mean(0, keepdim=True) if shares else part
            parts.append(row_statistics(part, block, request))
        write_results(results, joined(parts, 1), slots)
    return over_heads(results, heads)[kind]


def _check_weights(function: str, weights: Float[Tensor, "heads query key"]) -> None:
    # Written so that a NaN fails too.
    largest = weights.amax(-1)
    if not bool((weights >= 0).all() & (largest > 0).all() & largest.isfinite().all()):
        hint = "Pass probabilities after the softmax, with the causal, window and mask they had."
        got = "a negative, non-finite or empty row"
        condition = "to be finite, >= 0 and not all zero over the visible keys"
        raise invalid(function, "weights", condition, got, hint)
