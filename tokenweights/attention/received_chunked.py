"""Column sums of blocks of attention rows, beside the statistics of the rows themselves."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights.attention.received import Received
from tokenweights.attention.rows import RowBlock
from tokenweights.masked import accumulator_dtype


@dataclass
class ColumnSums:
    """What the keys of one sequence have received from the blocks of rows so far.

    Attributes:
        received: Which queries count.
        asked: True at queries that count, ` query`; None for all.
        first_position: Position of the first query.
        totals: Sums, or the largest weights, `heads key`.
        sums: Sums where the totals are something else.
        rows: The mass that was added up, summed along the rows, ` heads`.
    """

    received: Received
    asked: Bool[Tensor, " query"] | None
    first_position: int
    totals: Float[Tensor, "heads key"]
    sums: Float[Tensor, "heads key"] = field(init=False)
    rows: Float[Tensor, " heads"] = field(init=False)

    def __post_init__(self) -> None:
        largest = self.received.reduction == "max"
        self.sums = torch.zeros_like(self.totals) if largest else self.totals
        self.rows = self.totals.new_zeros(len(self.totals))

    def add(self, weights: Float[Tensor, "tile query key"], block: RowBlock, heads: slice) -> None:
        """Add a block of weights of some heads; it is overwritten."""
        own = self._asked(block)
        if own is not None and not bool(own.any()):
            return
        start, stop = _reached(block, self.received)
        if start >= stop:
            return
        weights = weights[..., start:stop]
        for columns, hidden in _beyond(block, self.received, start, stop):
            weights[..., columns].masked_fill_(hidden, 0.0)
        if own is not None and not bool(own.all()):
            weights.masked_fill_(~own[:, None], 0.0)
        wide = self.totals.dtype
        self.rows[heads] += weights.sum(-1).sum(-1, dtype=wide)
        place = slice(block.first_key + start, block.first_key + stop)
        self.sums[heads, place] += weights.sum(-2)
        if self.received.reduction == "max":
            totals = self.totals[heads, place]
            torch.maximum(totals, weights.amax(-2).to(wide), out=totals)

    def _asked(self, block: RowBlock) -> Bool[Tensor, " query"] | None:
        if self.asked is None:
            return None
        first = block.first_query - self.first_position
        return self.asked[first : first + block.queries]


def column_sums(
    received: Received,
    asked: Bool[Tensor, " query"] | None,
    *,
    heads: int,
    queries: int,
    keys: int,
    device: torch.device,
) -> ColumnSums:
    """Empty sums of a sequence whose queries are its last positions."""
    totals = torch.zeros(heads, keys, dtype=accumulator_dtype(device), device=device)
    return ColumnSums(received, asked, keys - queries, totals)


def _reached(block: RowBlock, received: Received) -> tuple[int, int]:
    """The block's columns that are in the horizon of some row."""
    first, last = received.horizon
    offset = block.first_query - block.first_key
    start = 0 if last is None else max(offset - last, 0)
    stop = block.keys if first is None else min(offset + block.queries - first, block.keys)
    return start, stop


def _beyond(
    block: RowBlock, received: Received, start: int, stop: int
) -> list[tuple[slice, Bool[Tensor, "query key"]]]:
    """Ranges of the columns from `start` to `stop` beyond the horizon of some row, and where.

    Only the corners at both ends of the horizon need a mask.
    """
    first, last = received.horizon
    offset, width = block.first_query - block.first_key - start, stop - start
    corners = []
    if first is not None and offset - first + 1 < width:
        edge = max(offset - first + 1, 0)
        ones = torch.ones(block.queries, width - edge, dtype=torch.bool, device=block.device)
        corners.append((slice(edge, width), ones.triu(offset - first + 1 - edge)))
    if last is not None and block.queries - 1 + offset - last > 0:
        edge = min(block.queries - 1 + offset - last, width)
        ones = torch.ones(block.queries, edge, dtype=torch.bool, device=block.device)
        corners.append((slice(0, edge), ones.tril(offset - last - 1)))
    return corners
