"""What an attention call's mask shows: which keys each query sees, read a block at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

# Entries of the square of queries and keys that are looked at together: a few MiB of booleans.
ENTRIES_AT_ONCE = 2**21

# Entries of a rectangle of queries and keys, `batch heads row column`; either of the first two
# axes may be 1 for all.
Shown = Callable[[slice, slice], Tensor]


class Unreadable(Exception):
    """Says what it is about a call that keeps query, key and padding from determining it."""


@dataclass(frozen=True)
class Square:
    """The mask of one call: `shown(rows, columns)` is True where a query sees a key.

    The queries are the last positions of the keys.
    """

    batch: int
    queries: int
    keys: int
    shown: Shown
    heads: int = 1

    @property
    def past(self) -> int:
        """Keys before the first query."""
        return self.keys - self.queries

    def row_blocks(self) -> Iterator[slice]:
        """Slices of the queries whose entries fit into memory together."""
        step = max(1, ENTRIES_AT_ONCE // max(1, self.batch * self.heads * self.keys))
        for start in range(0, self.queries, step):
            yield slice(start, min(start + step, self.queries))

    def own(self) -> Tensor:
        """Whether each query sees itself, `batch query`; padded queries do not."""
        seen = []
        for rows in self.row_blocks():
            columns = slice(rows.start + self.past, rows.stop + self.past)
            block = self.shown(rows, columns).diagonal(dim1=-2, dim2=-1)
            seen.append(block.all(1).expand(self.batch, -1))
        return torch.cat(seen, 1)


def tensor_mask(mask: Tensor, batch: int, queries: int, keys: int) -> Square:
    """A 4-D mask, boolean or added to the scores; it may have columns for later keys.

    What is added has to be 0 where a query sees a key: anything else is a bias, which the
    distribution of the layer has and query and key do not.
    """
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[2] == queries
    if not fits or mask.shape[3] < keys:
        raise Unreadable(f"a mask of shape {tuple(mask.shape)}")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise Unreadable(f"a mask of {mask.dtype}")

    def shown(rows: slice, columns: slice) -> Tensor:
        block = mask[:, :, rows, columns]
        if block.dtype == torch.bool:
            return block
        visible = block > torch.finfo(block.dtype).min / 2
        if bool((visible & (block != 0)).any()):
            raise Unreadable("a bias that its mask adds to the scores")
        return visible

    return Square(batch, queries, keys, shown, heads=mask.shape[1])


def block_mask(
    mask: BlockMask, batch: int, queries: int, keys: int, *, device: torch.device
) -> Square:
    """A block mask of flex attention: its blocks, and its function within them."""
    blocks = mask.to_dense().bool()
    high, wide = mask.BLOCK_SIZE
    if mask.shape[-2:] != (queries, keys):
        raise Unreadable(f"a block mask of shape {tuple(mask.shape)}")
    heads = blocks.shape[1]
    rows_of_batch = torch.arange(batch, device=device)[:, None, None, None]
    rows_of_heads = torch.arange(heads, device=device)[:, None, None]
    places = torch.arange(max(queries, keys), device=device)

    def shown(rows: slice, columns: slice) -> Tensor:
        row, column = places[rows, None], places[None, columns]
        within = mask.mask_mod(rows_of_batch, rows_of_heads, row, column)
        kept = blocks[:, :, places[rows] // high][..., places[columns] // wide]
        return kept & within

    return Square(batch, queries, keys, shown, heads=heads)
