"""Tables of work for the Triton kernels: which rows and keys each program takes.

Everything here runs on the CPU, without a loop over rows or sequences, and ends as one int32 table.
The columns are those that `triton_kernels.py` names.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from tokenweights.attention.layout import TokenSequence
from tokenweights.attention.statistics import Logits

FIRST_ROW, ROW_STOP, FIRST_KEY, KEY_STOP, PART, OUT_HEAD, PLACE, WIDTH, SUM_ROW = range(1, 10)
# Parts of fewer keys would spend their time on starting.
LEAST_PART = 1024
# Enough programs that the last ones to finish do not matter, few enough that sums stay small.
WANTED_ITEMS, MOST_PARTS = 2048, 16


def sequence_table(sequences: list[TokenSequence]) -> Int[Tensor, "sequence 5"]:
    """Batch row, first query slot, queries, first key slot and keys of contiguous sequences."""
    rows = []
    for sequence in sequences:
        slots = sequence.slots
        assert isinstance(slots.query, slice) and isinstance(slots.key, slice)
        rows.append(
            (
                slots.row,
                slots.query.start,
                slots.query.stop - slots.query.start,
                slots.key.start,
                slots.key.stop - slots.key.start,
            )
        )
    return torch.tensor(rows, dtype=torch.int32)


def unit_table(
    sequences: Int[Tensor, "sequence 5"],
    logits: Logits,
    *,
    rows: int,
    out_heads: int = 1,
    fixed_k: int | None = None,
    last_only: bool = False,
) -> Int[Tensor, "unit column"]:
    """Blocks of `rows` queries with the keys they see, the longest rows first.

    Args:
        sequences: As `sequence_table` makes them.
        logits: Which keys a query sees.
        rows: Largest number of rows of a block.
        out_heads: Repeats every block this often.
        fixed_k: Keeps only keys among the first `fixed_k` visible ones of some row.
        last_only: Keeps only the last block of each sequence.

    Returns:
        One row per block and output head, without places in the workspace and among the row sums.
    """
    queries, keys = sequences[:, 2].long(), sequences[:, 4].long()
    blocks = (queries + rows - 1) // rows
    owner = torch.repeat_interleave(torch.arange(len(sequences)), blocks)
    number = torch.arange(len(owner)) - (blocks.cumsum(0) - blocks)[owner]
    if last_only:
        last = number == blocks[owner] - 1
        owner, number = owner[last], number[last]
    first_row = number * rows
    row_stop = torch.minimum(first_row + rows, queries[owner])
    before = (keys - queries)[owner]
    key_stop = before + row_stop if logits.causal else keys[owner]
    first_key, last_start = torch.zeros_like(first_row), torch.zeros_like(first_row)
    if logits.window is not None:
        first_key = (before + first_row - logits.window + 1).clamp_min(0)
        last_start = (before + row_stop - logits.window).clamp_min(0)
    if fixed_k is not None:
        key_stop = torch.minimum(key_stop, last_start + fixed_k)
    empty = torch.zeros_like(owner)
    columns = [owner, first_row, row_stop, first_key, key_stop, empty, empty, empty, empty, empty]
    units = torch.stack(columns, 1).to(torch.int32)
    units = units[(first_key - key_stop).argsort(stable=True)]
    units = units.repeat_interleave(out_heads, 0)
    units[:, OUT_HEAD] = torch.arange(len(units), dtype=torch.int32) % out_heads
    return units


def widths(units: Int[Tensor, "unit column"]) -> Int[Tensor, " unit"]:
    """Keys of each unit."""
    return (units[:, KEY_STOP] - units[:, FIRST_KEY]).long()


def result_starts(
    units: Int[Tensor, "unit column"],
    sequences: Int[Tensor, "sequence 5"],
    query_slots: int,
    all_rows: int,
) -> Int[Tensor, " unit"]:
    """Place of each unit's first row among `output head * all_rows + row` of all results.

    Rows are numbered as `triton_kernels.py` says.
    """
    batch, slot = sequences[units[:, 0].long(), :2].long().unbind(1)
    head, row = units[:, OUT_HEAD].long(), units[:, FIRST_ROW].long()
    return head * all_rows + batch * query_slots + slot + row


def row_counts(units: Int[Tensor, "unit column"]) -> Int[Tensor, " unit"]:
    """Rows of each unit."""
    return (units[:, ROW_STOP] - units[:, FIRST_ROW]).long()


def with_sum_rows(
    units: Int[Tensor, "unit column"], places: Int[Tensor, " unit"]
) -> Int[Tensor, "unit column"]:
    """Units with the place of each one's first row among the row sums."""
    units = units.clone()
    units[:, SUM_ROW] = places.to(torch.int32)
    return units


def part_span(units: Int[Tensor, "unit column"], tile: int, most_parts: int = MOST_PARTS) -> int:
    """Keys per part, a multiple of `tile`, that keeps a device busy with parts of equal weight."""
    width = widths(units)
    span = max(LEAST_PART, int(width.sum()) // WANTED_ITEMS, -(-int(width.max()) // most_parts))
    return -(-span // tile) * tile


def item_table(units: Int[Tensor, "unit column"], span: int) -> Int[Tensor, "item column"]:
    """Every unit cut into parts of `span` keys."""
    parts = (widths(units) + span - 1) // span
    items = units.repeat_interleave(parts, 0)
    number = torch.arange(len(items)) - (parts.cumsum(0) - parts).repeat_interleave(parts)
    items[:, PART] = number.to(torch.int32)
    items[:, FIRST_KEY] += items[:, PART] * span
    items[:, KEY_STOP] = torch.minimum(items[:, KEY_STOP], items[:, FIRST_KEY] + span)
    return items


def affordable_rows(width: int, rows: int, tile: int, workspace_bytes: int) -> int:
    """Rows of a block whose float32 weights over `width` keys fit the workspace; at least one."""
    return max(min(rows, workspace_bytes // (4 * -(-width // tile) * tile)), 1)


def workspace_chunks(
    units: Int[Tensor, "unit column"], tile: int, workspace_bytes: int
) -> Iterator[tuple[Int[Tensor, "unit column"], int]]:
    """Units with places in a workspace of that many bytes, as many at a time as fit.

    Args:
        units: As `unit_table` makes them.
        tile: Keys of a tile; the rows of the workspace are as wide as whole tiles.
        workspace_bytes: Bound on a chunk, unless a single unit is above it.

    Yields:
        The units, and how many numbers they need.
    """
    width = (widths(units) + tile - 1) // tile * tile
    sizes = width * row_counts(units)
    # Places are int32.
    most = min(workspace_bytes // 4, 2**30)
    start = 0
    while start < len(units):
        ends = sizes[start:].cumsum(0)
        taken = max(int((ends <= most).sum()), 1)
        chunk, ends = units[start : start + taken].clone(), ends[:taken]
        # The kernels add the position of a key, of which the first is not stored.
        place = ends - sizes[start : start + taken] - chunk[:, FIRST_KEY]
        chunk[:, PLACE] = place.to(torch.int32)
        chunk[:, WIDTH] = width[start : start + taken].to(torch.int32)
        yield chunk, int(ends[-1])
        start += taken
