"""Attention received, in parts: what is asked for, sums over queries, counts and the pure finish.

A sum over some of the queries is a sufficient statistic, as is their number; a maximum merges too.
So blocks of rows, sequences and ranks add up, and nothing but a number per key is ever kept.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.attention.layout import TokenBatch, TokenSequence
from tokenweights.masked import accumulator_dtype

Reduction = Literal["mean", "sum", "max"]
Horizon = tuple[int | None, int | None]

# Of the mass of the rows: sums of the same float32 numbers in another order differ by far less.
COLUMN_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Received:
    """Which queries count towards the attention that a key receives, and how.

    Attributes:
        horizon: Least and largest distance from key to query, in real tokens; None for no bound. At
            distance 0 is a key's own query.
        reduction: `mean`, `sum` or `max` over these queries.
    """

    horizon: Horizon = (None, None)
    reduction: Reduction = "mean"

    @typed
    def bounded(self, keys: int) -> "Received":
        """The same request of rows of `keys` keys, in numbers that fit any integer type."""
        first, last = (None if end is None else min(end, max(keys, 1)) for end in self.horizon)
        return replace(self, horizon=(first, last))


def finished(
    received: Received, total: Float[Tensor, "*batch key"], count: Float[Tensor, "*batch key"]
) -> Float[Tensor, "*batch key"]:
    """What all queries together give: a key that no query counts for receives 0."""
    return total / count.clamp_min(1.0) if received.reduction == "mean" else total


def check_received(function: str, received: Received) -> None:
    """Refuse a horizon that no query is in."""
    first, last = received.horizon
    for end in (first, last):
        if end is not None and end < 0:
            hint = "It counts tokens from a key to the later queries; 0 is its own."
            raise invalid(function, "horizon", "of distances >= 0", received.horizon, hint)
    if first is not None and last is not None and first > last:
        hint = "Pass the least distance first."
        raise invalid(function, "horizon", "to rise", received.horizon, hint)


def check_columns(function: str, columns: float, rows: float, queries: int) -> None:
    """Refuse columns whose sum is not the mass of the rows that they were taken from."""
    # Written so that a NaN fails too.
    if not abs(columns - rows) <= COLUMN_TOLERANCE * max(queries, 1):
        condition = "and `key` to have columns that sum to the mass of their rows"
        got = f"{columns:.6g} over all keys and {rows:.6g} over all queries"
        hint = "Not your input but the machine or this library is at fault: please report it."
        raise invalid(function, "query", condition, got, hint)


def sequence_counts(
    queries: int, keys: int, asked: Bool[Tensor, " query"] | None, received: Received, like: Tensor
) -> Float[Tensor, " key"]:
    """How many of a sequence's queries are in the horizon of each key, through a window or not.

    Args:
        queries: Number of queries, the last positions of the keys.
        keys: Number of keys.
        asked: Which queries count; None for all.
        received: The horizon.
        like: A tensor on the device.

    Returns:
        Counts.
    """
    device = like.device
    if asked is None:
        asked = torch.ones(queries, dtype=torch.bool, device=device)
    # Queries before each position.
    before = torch.zeros(keys + 1, dtype=torch.int64, device=device)
    before[keys - queries + 1 :] = asked.cumsum(0)
    position = torch.arange(keys, device=device)
    first, last = received.horizon
    start = 0 if first is None else (position + first).clamp_max(keys)
    stop = keys if last is None else (position + last + 1).clamp_max(keys)
    count = before[stop] - before[start]
    return count.to(accumulator_dtype(device))


def batch_counts(
    batch: TokenBatch, received: Received, *, causal: bool
) -> Float[Tensor, "batch key"]:
    """`sequence_counts` of every sequence of a batch, where its keys lie."""
    rows, keys = batch.key.shape[0], batch.key.shape[2]
    counts = torch.zeros(rows, keys, dtype=accumulator_dtype(batch.key.device))
    counts = counts.to(batch.key.device)
    least = 0 if causal else None
    first, last = received.horizon
    # Queries before a key are at no distance of a causal layer.
    bounded = replace(received, horizon=(least if first is None else first, last))
    for sequence in batch.sequences:
        own = sequence_counts(
            sequence.query.shape[1], sequence.key.shape[1], sequence.asked, bounded, batch.key
        )
        counts[sequence.slots.row, sequence.slots.key] = own
    return counts


def asked_queries(sequence: TokenSequence) -> int:
    """How many queries of a sequence count."""
    return sequence.query.shape[1] if sequence.asked is None else int(sequence.asked.sum())
