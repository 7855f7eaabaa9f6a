"""The Triton kernel of attention received: one program per block of keys, its rows in order.

No two programs write to the same key, so nothing is added atomically and the result is the same at
every launch. Tables of work are those of `triton_kernels.py`; the rows of an item are those that
may look at its keys.
"""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from tokenweights.attention.triton_kernels import (
    ITEM_COLUMNS,
    LOG2E,
    _logit,
    _pairs,
    _tile,
    _work,
)


@triton.jit
def key_columns(
    query,
    key,
    lse,
    asked,
    totals,
    sequences,
    items,
    query_strides,
    key_strides,
    query_slots,
    all_rows,
    key_slots,
    all_keys,
    out_heads,
    group,
    scale,
    softcap,
    window,
    first,
    last,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Sums over rows of the head-averaged weights, `output head key`; then the largest of them."""
    first_row, row_stop, first_key, key_stop, batch, query_slot, key_slot, before, _ = _work(
        items, sequences
    )
    out_head = tl.load(items + tl.program_id(0) * ITEM_COLUMNS + 6)
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_KEYS)
    slot, last_key = key_slot + first_key, key_stop - 1 - first_key
    rows = batch * query_slots + query_slot
    total = tl.zeros([BLOCK_KEYS], tl.float32)
    largest = tl.zeros([BLOCK_KEYS], tl.float32)
    for start in range(first_row, row_stop, BLOCK_ROWS):
        query_slot_here, last_row = query_slot + start, row_stop - 1 - start
        real = tl.minimum(start + row, row_stop - 1)
        mean = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
        for head in range(out_head * HEADS, (out_head + 1) * HEADS):
            k = _tile(
                key, key_strides, batch, head // group, slot, last_key, BLOCK_KEYS, DIM, BLOCK_DIM
            )
            q = _tile(
                query,
                query_strides,
                batch,
                head,
                query_slot_here,
                last_row,
                BLOCK_ROWS,
                DIM,
                BLOCK_DIM,
            )
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
            shift = tl.load(lse + tl.cast(head, tl.int64) * all_rows + rows + real) * LOG2E
            mean += tl.exp2(_logit(score, scale, softcap) - shift[:, None])
        # One mask per tile, not per head; it also drops infinities of keys after the query.
        distance, counted = _pairs(
            before + start + row, first_key + column, key_stop, window, CAUSAL
        )
        counted &= (row <= last_row)[:, None]
        if first is not None:
            counted &= distance >= first
        if last is not None:
            counted &= distance <= last
        if asked is not None:
            counted &= (tl.load(asked + rows + real) != 0)[:, None]
        mean = tl.where(counted, mean * (1.0 / HEADS), 0.0)
        total += tl.sum(mean, axis=0)
        if LARGEST:
            largest = tl.maximum(largest, tl.max(mean, axis=0))
    out = totals + tl.cast(out_head, tl.int64) * all_keys + batch * key_slots + slot
    written = column <= last_key
    tl.store(out + column, total, mask=written)
    if LARGEST:
        plane = tl.cast(out_heads, tl.int64) * all_keys
        tl.store(out + plane + column, largest, mask=written)
