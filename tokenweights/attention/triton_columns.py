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
    _tile,
    _visible,
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
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
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
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ASKED: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    LARGEST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Sums over rows of the head-averaged weights, `output head key`; then the largest of them."""
    first_row, row_stop, first_key, key_stop, batch, query_slot, key_slot, queries, keys = _work(
        items, sequences
    )
    out_head = tl.load(items + tl.program_id(0) * ITEM_COLUMNS + 6)
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_KEYS)
    rows = batch * query_slots + query_slot
    denominators = lse + tl.cast(out_head * HEADS, tl.int64) * all_rows + rows
    total = tl.zeros([BLOCK_KEYS], tl.float32)
    largest = tl.zeros([BLOCK_KEYS], tl.float32)
    for start in range(first_row, row_stop, BLOCK_ROWS):
        real = tl.minimum(start + row, row_stop - 1)
        mean = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
        for head in range(0, HEADS):
            k = _tile(
                key,
                batch,
                (out_head * HEADS + head) // group,
                key_slot + first_key,
                key_stop - 1 - first_key,
                key_batch,
                key_head,
                key_token,
                BLOCK_KEYS,
                DIM,
                BLOCK_DIM,
                DESCRIPTORS,
                UPCAST,
            )
            q = _tile(
                query,
                batch,
                out_head * HEADS + head,
                query_slot + start,
                row_stop - 1 - start,
                query_batch,
                query_head,
                query_token,
                BLOCK_ROWS,
                DIM,
                BLOCK_DIM,
                DESCRIPTORS,
                UPCAST,
            )
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
            shift = tl.load(denominators + tl.cast(head, tl.int64) * all_rows + real) * LOG2E
            mean += tl.exp2(_logit(score, scale, softcap, SOFTCAP) - shift[:, None])
        # One mask per tile, not per head; it also drops infinities of keys after the query.
        place = first_key + column
        distance = (keys - queries + start + row)[:, None] - place[None, :]
        counted = _visible(distance, place[None, :], key_stop, window, CAUSAL, WINDOW)
        counted &= (start + row < row_stop)[:, None]
        if FIRST:
            counted &= distance >= first
        if LAST:
            counted &= distance <= last
        if ASKED:
            counted &= (tl.load(asked + rows + real) != 0)[:, None]
        mean = tl.where(counted, mean * (1.0 / HEADS), 0.0)
        total += tl.sum(mean, axis=0)
        if LARGEST:
            largest = tl.maximum(largest, tl.max(mean, axis=0))
    out = totals + tl.cast(out_head, tl.int64) * all_keys + batch * key_slots + key_slot
    written = column < key_stop - first_key
    tl.store(out + first_key + column, total, mask=written)
    if LARGEST:
        plane = tl.cast(out_heads, tl.int64) * all_keys
        tl.store(out + plane + first_key + column, largest, mask=written)
