"""Moves parameters along a direction and back, with one extra copy of them in all."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import TracebackType

import torch
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights.gradients.shards import inner_product, local_shard


class Displacement:
    """A context in which parameters can be moved; on exit they are bitwise what they were.

    The memory of `direction` is reused: once the parameters have moved, it holds their old values,
    and the way they went is the difference. So the context needs no copy beyond the direction.

    Raises:
        TokenWeightsError: If two parameters share memory, which would move twice.
    """

    def __init__(self, parameters: Sequence[Tensor], direction: Sequence[Tensor]):
        self._direction = direction
        self._pairs = [
            (local_shard(p), local_shard(d)) for p, d in zip(parameters, direction, strict=True)
        ]
        if _overlap([parameter for parameter, _ in self._pairs]):
            hint = "Tie them by using one `nn.Parameter` twice, or take method='forward'."
            raise invalid("token_alignment", "model", "without shared memory", "two that do", hint)
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


def _overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether the memory of one tensor, from its first element to its last, reaches into another's.

    Disjoint parts of one buffer, as flattened weights are, do not overlap.
    """
    spans = []
    for tensor in tensors:
        if tensor.numel():
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            length = 1 + sum((size - 1) * stride for size, stride in steps)
            start = tensor.data_ptr()
            spans.append((str(tensor.device), start, start + length * tensor.element_size()))
    spans.sort()
    return any(
        one == other and stop > start for (one, _, stop), (other, start, _) in pairwise(spans)
    )
