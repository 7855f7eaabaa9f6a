"""Refuses attention that query, key and padding, or packed positions, do not determine."""

from typing import Any

import torch
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights.capture.layers import implementation, layer_type, visible_window

# Rows of a packed mask that are compared at a time: at 36,864 tokens, 0.3 GB of distances.
ROWS_AT_ONCE = 1024
_CAUSAL_LAYERS = ("full_attention", "sliding_attention")


def refuse_unknown_attention(
    layer: int, module: Any, query: Tensor, key: Tensor, mask: Any, options: dict, packed: bool
) -> None:
    """Raises if an entropy of these queries and keys would not be that of the layer's attention."""
    fault = _layer_fault(module, options)
    if fault is None:
        mask_fault = _packed_mask_fault if packed else _mask_fault
        fault = mask_fault(module, query, key, mask, options)
    if fault is not None:
        raise invalid(
            "capture_attention",
            "layers",
            "whose attention query, key and padding determine: causal, full or sliding-window",
            f"layer {layer}, {fault}",
            "Probe another layer, or pass one unpacked sequence a row over a growing cache. "
            "A row of several sequences needs `packed=True` and position ids.",
        )


def _layer_fault(module: Any, options: dict) -> str | None:
    kind = layer_type(module)
    if kind not in _CAUSAL_LAYERS:
        return f"a layer of type {kind!r}"
    if not module.is_causal:
        return "a layer that is not causal"
    return "a layer with a position bias" if options.get("position_bias") is not None else None


def _mask_fault(module: Any, query: Tensor, key: Tensor, mask: Any, options: dict) -> str | None:
    if options.get("cu_seq_lens_q") is not None or (mask is None and _restarts(options)):
        return "several sequences packed into a row"
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    window = visible_window(module, options)
    if _is_causal_mask(mask, query.shape[2], key.shape[2], window):
        return None
    return "a mask other than causal order, window and padding (or a static cache)"


def _packed_mask_fault(
    module: Any, query: Tensor, key: Tensor, mask: Any, options: dict
) -> str | None:
    """Why a call is not one row of sequences that attend only within themselves, if so."""
    positions, tokens = options.get("position_ids"), query.shape[2]
    if query.shape[0] != 1 or tokens != key.shape[2]:
        return f"queries {tuple(query.shape)} and keys {tuple(key.shape)}, not one packed row"
    if not isinstance(positions, Tensor) or positions.shape != (1, tokens):
        shape = tuple(positions.shape) if isinstance(positions, Tensor) else None
        return f"position ids of shape {shape} for {tokens} packed tokens"
    if mask is None:
        # Flash attention itself keeps sequences apart, by their positions; others need a mask.
        several = bool((positions[0, 1:] == 0).any())
        apart = "flash" in implementation(module) or not several
        return None if apart else "several sequences packed into a row and no mask between them"
    if isinstance(mask, Tensor) and mask.dim() != 4:
        return "a padding mask on a packed row"
    if isinstance(mask, Tensor) and not _is_packed_mask(
        mask, positions[0], visible_window(module, options)
    ):
        return "a mask that mixes sequences"
    return None


def _is_packed_mask(mask: Tensor, positions: Tensor, window: int | None) -> bool:
    """Whether a 4-D mask shows what order, window and the bounds of sequences show.

    A packed row is long, so that only some rows of the square are looked at together.
    """
    sequence = (positions == 0).cumsum(0)
    places = torch.arange(len(sequence), device=positions.device)
    for start in range(0, len(places), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        distance = places[rows, None] - places
        visible = (sequence[rows, None] == sequence) & (distance >= 0)
        if window is not None:
            visible &= distance < window
        if not torch.equal(_visible(mask[:, :, rows])[0], visible):
            return False
    return True


def _is_causal_mask(mask: Tensor, queries: int, keys: int, window: int | None) -> bool:
    """Whether a 4-D mask hides what order, window and padding hide, and nothing else.

    A key counts as padding if no query sees it. Rows of padded queries may show anything.
    """
    visible = _visible(mask)[..., :keys]
    positions = torch.arange(keys, device=mask.device)
    distance = positions[keys - queries :, None] - positions
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    own = visible.diagonal(keys - queries, dim1=-2, dim2=-1)  # what each query shows of itself
    real_rows = own[..., None]
    if queries < keys and not bool(own[:, -1].any()):
        return False  # a cache with free slots: the queries are not its last positions
    real_keys = (visible & real_rows).any(1, keepdim=True)
    if window is not None:
        # A key that has left every window may be real or not; no row asks.
        real_keys |= ~allowed.any(0)
    return bool(((visible == (allowed & real_keys)) | ~real_rows).all())


def _visible(mask: Tensor) -> Tensor:
    """A 4-D mask, boolean or additive, as True where a query sees a key: `batch query key`."""
    return (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0]


def _restarts(options: dict) -> bool:
    """Whether positions fall within a row: without a mask that means packed sequences."""
    positions = options.get("position_ids")
    return isinstance(positions, Tensor) and bool((positions.diff(dim=-1) < 0).any())
