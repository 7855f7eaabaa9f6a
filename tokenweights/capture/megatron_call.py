"""One call of megatron-core's attention: what its core attention is handed, and where that lies."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenweights.capture.captured import CapturedAttention
from tokenweights.capture.masks import Unreadable
from tokenweights.capture.megatron_layers import is_a
from tokenweights.capture.shards import Shards, zigzag_positions

# Whose `forward` takes query and key as they are, and attends by causal order, window and padding.
LOCAL = "megatron.core.transformer.dot_product_attention.DotProductAttention"
ENGINE = "megatron.core.extensions.transformer_engine.TEDotProductAttention"


def captured_call(
    attention: Any, core: Any, given: dict[str, Any], layer: int, packed: bool
) -> CapturedAttention:
    """The call as it is captured.

    Args:
        attention: Megatron's self-attention module.
        core: Its core attention.
        given: What that is handed, by the names it has for it.
        layer: Index of the layer.
        packed: Whether the caller expects packed rows.

    Raises:
        Unreadable: If query, key and padding do not determine what it attends to.
    """
    row = given.get("packed_seq_params")
    thd = row is not None and row.qkv_format == "thd"
    if thd != packed:
        told = "several sequences packed into a row" if thd else "rows of one sequence each"
        raise Unreadable(f"{told}: capture with `packed={thd}`")
    if given.get("attention_bias") is not None:
        raise Unreadable("a bias on the scores")
    config, groups = attention.config, attention.pg_collection
    scale = getattr(config, "softmax_scale", None)
    sinks = getattr(core, "softmax_offset", None)
    layout = _packed_layout if thd else _padded_layout
    query, key, mask, shards = layout(attention, core, given, groups.cp, groups.tp)
    starts = shards.cu_seqlens[
        torch.searchsorted(shards.cu_seqlens, shards.positions, right=True) - 1
    ]
    return CapturedAttention(
        layer=layer,
        query=query.detach(),
        key=key.detach(),
        # `apply_query_key_layer_scaling` divides by the layer's number, and the softmax multiplies.
        scale=config.kv_channels**-0.5 if scale is None else float(scale),
        window=_window(config, layer),
        softcap=None,
        sinks=None if sinks is None else sinks.detach().flatten(),
        position_ids=(shards.positions - starts)[None] if thd else None,
        key_mask=mask,
        shards=shards,
    )


def _packed_layout(
    attention: Any, core: Any, given: dict[str, Any], cp: Any, tp: Any
) -> tuple[Tensor, Tensor, Tensor | None, Shards]:
    row = given["packed_seq_params"]
    for name in ("cp_group", "local_cp_size"):
        if getattr(row, name, None) is not None:
            raise Unreadable("context parallelism of another size in every batch")
    if getattr(row, "cp_partition_mode", "zigzag") != "zigzag":  # newer than 0.16
        raise Unreadable(f"context parallelism in {row.cp_partition_mode} slices")
    query, key = (_row_of(given[name]) for name in ("query", "key"))
    real = row.cu_seqlens_q
    laid = real if row.cu_seqlens_q_padded is None else row.cu_seqlens_q_padded
    bounds = laid.long()
    own = zigzag_positions(bounds, ranks=cp.size(), rank=cp.rank(), device=query.device)
    if len(own) != query.shape[2] or query.shape[2] != key.shape[2]:
        shapes = f"{query.shape[2]} queries and {key.shape[2]} keys"
        raise Unreadable(f"{shapes} where the row's boundaries give this rank {len(own)} tokens")
    mask = None
    if not torch.equal(real.long(), bounds):
        sequence = torch.searchsorted(bounds, own, right=True) - 1
        mask = (own - bounds[sequence] < real.long().diff()[sequence])[None]
    return query, key, mask, Shards(own, bounds, *_several(cp, tp))


def _padded_layout(
    attention: Any, core: Any, given: dict[str, Any], cp: Any, tp: Any
) -> tuple[Tensor, Tensor, Tensor | None, Shards]:
    query, key = (given[name].permute(1, 2, 0, 3) for name in ("query", "key"))
    batch, tokens = query.shape[0], query.shape[2]
    if tokens != key.shape[2]:
        raise Unreadable(f"{tokens} queries and {key.shape[2]} keys of a cache")
    kind = given.get("attn_mask_type")
    kind = (attention.attn_mask_type if kind is None else kind).name
    mask = _key_mask(given.get("attention_mask"), kind, core, batch, tokens, cp.size())
    bounds = torch.arange(batch + 1, device=query.device) * tokens * cp.size()
    own = zigzag_positions(bounds, ranks=cp.size(), rank=cp.rank(), device=query.device)
    return query, key, mask, Shards(own, bounds, *_several(cp, tp))


def _key_mask(
    mask: Any, kind: str, core: Any, batch: int, tokens: int, token_ranks: int
) -> Tensor | None:
    """True for real keys, `batch key`; None where causal order and window are all there is.

    Megatron's masks are True where a key is hidden.
    """
    local = is_a(core, LOCAL)
    if kind not in ("causal", "padding_causal"):
        raise Unreadable(f"a mask of the kind `{kind}`")
    windowed = local and core.scale_mask_softmax.window_size is not None
    # Megatron's own attention reads a mask whatever its kind is, but none beside a window;
    # Transformer Engine's reads it by its kind.
    if mask is None or windowed or (not local and kind == "causal"):
        if local and not windowed and core.attn_mask_type.name != "causal":
            raise Unreadable("no mask, and a layer that is not causal")
        return None
    if token_ranks > 1 or mask.dim() != 4 or mask.shape[3] != tokens:
        raise Unreadable(f"a mask of shape {tuple(mask.shape)}")
    shown = ~mask.bool().expand(batch, -1, -1, -1)
    if not local and mask.shape[2] == 1:
        real = shown[:, 0, 0]
    else:
        real = shown.any(2).all(1)
    order = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    if local or mask.shape[2] != 1:
        # Rows of padded queries may show anything.
        wanted = (order & real[:, None])[:, None].expand(-1, shown.shape[1], -1, -1)
        if shown.shape[2] != tokens or bool(((shown != wanted) & real[:, None, :, None]).any()):
            raise Unreadable("a mask other than causal order and padding")
    return None if bool(real.all()) else real


def _window(config: Any, layer: int) -> int | None:
    """Visible keys of a layer with a sliding window; megatron counts those before the query."""
    size, skipped = getattr(config, "window_size", None), config.window_attn_skip_freq
    if not size:
        return None
    if isinstance(skipped, int) and (layer + 1) % skipped == 0:
        return None
    if isinstance(skipped, list) and not skipped[layer]:
        return None
    left, right = size
    if left < 0 or right != 0:
        raise Unreadable(f"a window of {size}")
    return left + 1


def _row_of(states: Tensor) -> Tensor:
    """Packed states as `1 heads token dim`; they may have a batch of one in the middle."""
    return states.reshape(states.shape[0], *states.shape[-2:]).transpose(0, 1)[None]


def _several(*groups: dist.ProcessGroup) -> list[dist.ProcessGroup | None]:
    """Groups of one rank as None."""
    return [None if group.size() == 1 else group for group in groups]
