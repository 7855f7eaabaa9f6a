"""Attention received by the Triton kernel: the table of key blocks, the launch and its check."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenweights.attention import triton_columns
from tokenweights.attention.checks import check_results
from tokenweights.attention.layout import TokenBatch
from tokenweights.attention.received import Received, asked_queries, check_columns
from tokenweights.attention.statistics import Logits
from tokenweights.attention.triton_configuration import Configuration, Tiles
from tokenweights.attention.triton_work import FIRST_KEY, FIRST_ROW, KEY_STOP, OUT_HEAD, ROW_STOP

if TYPE_CHECKING:
    from tokenweights.attention.triton_backend import _Sweep

# Type checkers do not know that a kernel takes launch options.
_KERNELS: Any = triton_columns


def column_tiles(configuration: Configuration, element_bytes: int) -> Tiles:
    """The tiles of a configuration, by default those at which no architecture spills."""
    if configuration.columns is not None:
        return configuration.columns
    if element_bytes == 4:
        return configuration.denominators
    return replace(configuration.sums, stages=min(configuration.sums.stages, 2))


def key_block_table(
    sequences: Int[Tensor, "sequence 5"],
    logits: Logits,
    received: Received,
    *,
    keys: int,
    out_heads: int,
) -> Int[Tensor, "unit column"]:
    """Blocks of `keys` keys with the rows that may count for one of them, the longest first."""
    queries, every = sequences[:, 2].long(), sequences[:, 4].long()
    blocks = (every + keys - 1) // keys
    owner = torch.repeat_interleave(torch.arange(len(sequences)), blocks)
    number = torch.arange(len(owner)) - (blocks.cumsum(0) - blocks)[owner]
    first_key = number * keys
    key_stop = torch.minimum(first_key + keys, every[owner])
    before = (every - queries)[owner]
    least, most = received.horizon
    if logits.causal:
        least = least or 0
    if logits.window is not None:
        most = logits.window - 1 if most is None else min(most, logits.window - 1)
    first_row, row_stop = torch.zeros_like(owner), queries[owner]
    if least is not None:
        first_row = (first_key + least - before).clamp_min(0)
    if most is not None:
        row_stop = torch.minimum(row_stop, (key_stop + most - before).clamp_min(0))
    units = torch.zeros(len(owner), 10, dtype=torch.int32)
    units[:, 0], units[:, FIRST_KEY], units[:, KEY_STOP] = owner, first_key, key_stop
    units[:, FIRST_ROW], units[:, ROW_STOP] = torch.minimum(first_row, row_stop), row_stop
    units = units[(units[:, FIRST_ROW] - units[:, ROW_STOP]).argsort(stable=True)]
    units = units.repeat_interleave(out_heads, 0)
    units[:, OUT_HEAD] = torch.arange(len(units), dtype=torch.int32) % out_heads
    return units


def triton_received(
    function: str, sweep: "_Sweep", batch: TokenBatch, received: Received
) -> Float[Tensor, "batch heads key"]:
    """Totals of what each key receives: sums over the queries that count, or the largest weights.

    Args:
        function: Public name for error messages.
        sweep: The tensors of the call, with their denominators.
        batch: Its sequences, each without holes.
        received: Which queries count, and how.

    Returns:
        Totals, 0 where no key is.
    """
    tiles = column_tiles(sweep.configuration, sweep.query.element_size())
    rows, key_slots = sweep.batch, sweep.key.shape[2]
    all_keys = rows * key_slots
    largest = received.reduction == "max"
    totals = sweep._zeros(1 + largest, sweep.out_heads, all_keys)
    asked = None
    if any(sequence.asked is not None for sequence in batch.sequences):
        asked = torch.zeros(rows, sweep.query_slots, dtype=torch.int8, device=sweep.device)
        for sequence in batch.sequences:
            own = True if sequence.asked is None else sequence.asked.to(torch.int8)
            asked[sequence.slots.row, sequence.slots.query] = own
    units = key_block_table(
        sweep.sequences_host,
        sweep.logits,
        received,
        keys=tiles.keys,
        out_heads=sweep.out_heads,
    )
    first, last = received.horizon
    _KERNELS.key_columns[(len(units),)](
        sweep._loaded(sweep.query, tiles.rows),
        sweep._loaded(sweep.key, tiles.keys),
        sweep.lse,
        asked,
        totals,
        sweep.sequences,
        sweep._on_device(units),
        *sweep._strides(),
        sweep.query_slots,
        sweep.all_rows,
        key_slots,
        all_keys,
        sweep.out_heads,
        sweep.group,
        *sweep._logit_parameters(),
        first,
        last,
        HEADS=sweep.heads // sweep.out_heads,
        LARGEST=largest,
        **sweep._constants(tiles),
    )
    check_results(function, {"row_mass": totals})
    _check(function, sweep, batch, received, totals[0])
    return totals[-1].view(sweep.out_heads, rows, key_slots).transpose(0, 1)


def _check(
    function: str,
    sweep: "_Sweep",
    batch: TokenBatch,
    received: Received,
    sums: Float[Tensor, "heads key"],
) -> None:
    """Compare the columns with the mass of the rows, which is what the sinks leave of 1.

    Of a horizon the rows know no more than that it holds at most their mass.
    """
    queries = sum(map(asked_queries, batch.sequences)) * sweep.out_heads
    mass = float(queries)
    if sweep.sinks is not None:
        share = (sweep.sinks[:, None] - sweep.lse).exp().view(-1, sweep.batch, sweep.query_slots)
        for sequence in batch.sequences:
            own = share[:, sequence.slots.row, sequence.slots.query].double()
            own = own if sequence.asked is None else own[:, sequence.asked]
            mass -= float(own.sum()) * sweep.out_heads / sweep.heads
    columns = float(sums.sum(dtype=torch.float64))
    bounded = received.horizon != (None, None)
    check_columns(function, columns, min(columns, mass) if bounded else mass, queries)
