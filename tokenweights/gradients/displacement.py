"""Moves parameters along a direction and back, with one extra copy of them in all."""

from collections.abc import Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor

from tokenweights.gradients.shards import inner_product, local_shard


class Displacement:
    """A context in which parameters can be moved; on exit they are bitwise what they were.

    The memory of `direction` is reused: once the parameters have moved, it holds their old values,
    and the way they went is the difference. So the context needs no copy beyond the direction.
    """

    def __init__(self, parameters: Sequence[Tensor], direction: Sequence[Tensor]):
        self._direction = direction
        self._pairs = [
            (local_shard(p), local_shard(d)) for p, d in zip(parameters, direction, strict=True)
        ]
        self._moved = 0
        self._factor = 1.0

    def __enter__(self) -> "Displacement":
        return self

    def start(self, step: float) -> float:
        """Adds `step` times the direction, which is consumed.

        Returns:
            The inner product of the direction and of the way the parameters went, which their
            precision rounds.
        """
        return inner_product(self._moves(step), self._direction)

    def _moves(self, step: float) -> Iterator[Tensor]:
        for parameter, direction in self._pairs:
            moved = parameter + step * direction
            yield moved - parameter  # its inner product with the direction is taken here
            direction.copy_(parameter)
            self._moved += 1  # from here on `direction` holds what has to be restored
            parameter.copy_(moved)

    def move_to(self, factor: float) -> None:
        """Moves the parameters to `factor` times the way that `start` took them."""
        for parameter, origin in self._pairs:
            parameter.copy_(origin + factor / self._factor * (parameter - origin))
        self._factor = factor

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with torch.no_grad():
            for parameter, origin in self._pairs[: self._moved]:
                parameter.copy_(origin)
