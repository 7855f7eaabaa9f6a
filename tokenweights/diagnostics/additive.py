"""Records whose fields are sums over tokens, so that a merge is an addition."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.distributed import global_sum, merge

Record = TypeVar("Record", bound="Additive")


class Additive:
    """A frozen dataclass of float64 sums; a field that was not asked for is None."""

    @typed
    def merged(self: Record, other: Record) -> Record:
        """The record of both parts of a batch, whatever the order.

        Args:
            other: The record of other tokens, with the same fields and shapes.

        Returns:
            A new record.

        Raises:
            TokenWeightsError: If fields or shapes differ.
        """
        pairs = alike(self, other).values()
        return type(self)(
            *(None if mine is None or theirs is None else mine + theirs for mine, theirs in pairs)
        )

    @merge
    @typed
    def over_ranks(self: Record, group: dist.ProcessGroup | None) -> Record:
        """The record of the whole batch, in one reduction.

        Args:
            group: The ranks that share the batch, all of which have to call; None leaves the
                record as it is.

        Returns:
            The same record on every rank.
        """
        sums = list(vars(self).values())
        flat = torch.cat([total.flatten() for total in sums if total is not None])
        parts = iter(
            global_sum(flat, group=group).split([t.numel() for t in sums if t is not None])
        )
        return type(self)(
            *(None if total is None else next(parts).view(total.shape) for total in sums)
        )


def alike(mine: object, other: object) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """The fields of two records of one kind, side by side.

    Raises:
        TokenWeightsError: If a field's shape differs, or it is None in one record only.
    """
    pairs = {}
    for name, value in vars(mine).items():
        pair = value, getattr(other, name)
        shapes = [None if each is None else tuple(each.shape) for each in pair]
        if shapes[0] != shapes[1]:
            raise invalid(
                f"{type(mine).__name__}.merged",
                "other",
                f"with `{name}` of shape {shapes[0]}",
                shapes[1],
                "Merge records of the same statistics of the same groups.",
            )
        pairs[name] = pair
    return pairs
