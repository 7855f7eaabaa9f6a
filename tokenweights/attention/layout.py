"""From a padded batch to sequences of real tokens and back.

Every layout is taken apart into the same pieces before anything is computed: sequences in which
no padding is left. A left-padded, a right-padded and a packed batch therefore give equal numbers,
and a padded position is never read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Indices = slice | Int[Tensor, " index"]


@dataclass(frozen=True)
class Slots:
    """Where the real tokens of one row lie in a batch, along its query and its key axis."""

    row: int
    query: Indices
    key: Indices


@dataclass(frozen=True)
class TokenSequence:
    """One sequence without padding; its queries are the last positions of its keys."""

    query: Float[Tensor, "heads query dim"]
    key: Float[Tensor, "kv_heads key dim"]
    lse: Float[Tensor, "heads query"] | None
    slots: Slots
    # True at the queries that count towards what keys receive; None if all do.
    asked: Bool[Tensor, " query"] | None = None


@dataclass(frozen=True)
class SequenceStack:
    """Sequences of equal lengths, their heads one after another, sequence by sequence."""

    query: Float[Tensor, "heads query dim"]
    key: Float[Tensor, "kv_heads key dim"]
    lse: Float[Tensor, "heads query"] | None
    sequences: tuple[TokenSequence, ...]


@dataclass(frozen=True)
class TokenBatch:
    """A batch as it was given, and the sequences it holds, each with at least one query.

    A packed batch is a single row of sequences.
    """

    query: Float[Tensor, "batch heads query dim"]
    key: Float[Tensor, "batch kv_heads key dim"]
    lse: Float[Tensor, "batch heads query"] | None
    sequences: tuple[TokenSequence, ...]


def token_slots(
    batch: int, queries: int, keys: int, key_mask: Bool[Tensor, "batch key"] | None
) -> Iterator[Slots]:
    """The slots of every row with at least one real query, the queries being the last slots."""
    padding = keys - queries
    everything: list[Indices] = [slice(0, keys)] * batch
    for row, real in enumerate(everything if key_mask is None else _real_slots(key_mask)):
        if isinstance(real, slice):
            asked = slice(max(real.start - padding, 0), max(real.stop - padding, 0))
            any_query = asked.start < asked.stop
        else:
            asked = real[real >= padding] - padding
            any_query = len(asked) > 0
        if any_query:
            yield Slots(row=row, query=asked, key=real)


def padded_batch(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads key dim"],
    key_mask: Bool[Tensor, "batch key"] | None,
    lse: Float[Tensor, "batch heads query"] | None,
    rows: Bool[Tensor, "batch query"] | None = None,
) -> TokenBatch:
    """A padded batch, cut to the real tokens of its rows."""
    sequences = (
        TokenSequence(
            query=query[slots.row][:, slots.query],
            key=key[slots.row][:, slots.key],
            lse=None if lse is None else lse[slots.row][:, slots.query],
            slots=slots,
            asked=None if rows is None else rows[slots.row][slots.query],
        )
        for slots in token_slots(query.shape[0], query.shape[2], key.shape[2], key_mask)
    )
    return TokenBatch(query, key, lse, tuple(sequences))


def packed_batch(
    query: Float[Tensor, "total_q heads dim"],
    key: Float[Tensor, "total_k kv_heads dim"],
    query_bounds: list[int],
    key_bounds: list[int],
    lse: Float[Tensor, "heads total_q"] | None,
    rows: Bool[Tensor, " total_q"] | None = None,
) -> TokenBatch:
    """A packed batch, cut at its bounds."""
    sequences = []
    for index in range(len(query_bounds) - 1):
        asked = slice(query_bounds[index], query_bounds[index + 1])
        real = slice(key_bounds[index], key_bounds[index + 1])
        if asked.start < asked.stop:
            sequence = TokenSequence(
                query=query[asked].transpose(0, 1),
                key=key[real].transpose(0, 1),
                lse=None if lse is None else lse[:, asked],
                slots=Slots(row=0, query=asked, key=real),
                asked=None if rows is None else rows[asked],
            )
            sequences.append(sequence)
    return TokenBatch(
        query=query.transpose(0, 1)[None],
        key=key.transpose(0, 1)[None],
        lse=None if lse is None else lse[None],
        sequences=tuple(sequences),
    )


def sequence_stacks(
    sequences: Sequence[TokenSequence], most: Callable[[TokenSequence], int]
) -> Iterator[SequenceStack]:
    """All sequences in stacks of equal lengths, of no more than `most(sequence)` each.

    A call of torch costs more than the work of a short sequence. A stack of one is the sequence
    itself, without a copy.
    """
    alike: dict[tuple[int, int], list[TokenSequence]] = {}
    for sequence in sequences:
        alike.setdefault((sequence.query.shape[1], sequence.key.shape[1]), []).append(sequence)
    for equal in alike.values():
        step = most(equal[0])
        for first in range(0, len(equal), step):
            taken = equal[first : first + step]
            known = [sequence.lse for sequence in taken if sequence.lse is not None]
            yield SequenceStack(
                query=_one_after_another([sequence.query for sequence in taken]),
                key=_one_after_another([sequence.key for sequence in taken]),
                lse=_one_after_another(known) if known else None,
                sequences=tuple(taken),
            )


def _real_slots(key_mask: Bool[Tensor, "batch key"]) -> list[Indices]:
    """The slots of the real tokens of each row: a slice where they are contiguous.

    Slices are views, so a padded batch is read in place; holes inside a row cost a gather.
    """
    batch, length = key_mask.shape
    if length == 0:
        return [slice(0, 0)] * batch
    count = key_mask.sum(1)
    first = key_mask.int().argmax(1)
    last = length - 1 - key_mask.flip(1).int().argmax(1)
    bounds = torch.stack([count, first, last], 1).tolist()
    slots: list[Indices] = []
    for row, (real, start, end) in enumerate(bounds):
        if real == end - start + 1:
            slots.append(slice(start, end + 1))
        else:
            slots.append(key_mask[row].nonzero().squeeze(1))
    return slots


def _one_after_another(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
