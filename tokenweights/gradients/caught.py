"""Gradients caught in the backward pass, before an engine's own hooks take them away."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.distributed import agreement


class CaughtGradients:
    """Gradients averaged over ranks, of which each rank keeps its share: a probe of an engine.

    An engine that shards its optimizer or its parameters, as DeepSpeed does, takes gradients away
    in the backward pass. Here they leave it earlier, so the engine's buffers and counters stay as
    they are. Give `backward` and `take` to `GradientProbe`, and `group` with them.

    Gradients are reduced in the same order on every rank, the last parameter first, as soon as
    those before them are there; at the end of a pass the missing ones count as zero. So a rank may
    leave out parameters that others use, as ranks of a mixture of experts do, but not as
    DeepSpeed's leaf modules at ZeRO-3, which reduce in hooks of their own. Memory is this rank's
    share of the gradient in at least float32, one whole gradient, and those that wait for their
    turn.

    Args:
        model: The module without its engine. Only parameters that require gradients count.
        group: The ranks that share the batch. All of them have to run each pass.

    Raises:
        TokenWeightsError: If a parameter is a DTensor, which `GradientProbe` reads by itself.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> with CaughtGradients(model) as caught:
        ...     caught.backward(model(torch.tensor([3.0, 4.0])).sum())
        ...     found = caught.take()
        >>> [share.tolist() for share in found], model.weight.grad
        ([[3.0, 4.0]], None)
    """

    @typed
    def __init__(self, model: nn.Module, *, group: dist.ProcessGroup | None = None):
        self.group = group
        # Backward passes reach the last parameter first.
        self._parameters = [p for p in model.parameters() if p.requires_grad][::-1]
        if any(hasattr(parameter, "device_mesh") for parameter in self._parameters):
            hint = "Leave out `backward` and `gradients` of the probe."
            raise invalid("CaughtGradients", "model", "without DTensors", "one that has", hint)
        self._shares: dict[int, Tensor] = {}
        self._waiting: dict[int, Tensor] = {}
        self._turn = 0

    def __enter__(self) -> "CaughtGradients":
        self._hooks = [
            parameter.register_hook(lambda gradient, place=place: self._caught(place, gradient))
            for place, parameter in enumerate(self._parameters)
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @typed
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss; no parameter's `.grad` is touched.

        Args:
            loss: A scalar with a graph.

        Raises:
            TokenWeightsError: If it is not, on any rank. An error in the pass itself leaves the
                other ranks in the reduction of a gradient.
        """
        with agreement("CaughtGradients.backward", self.group):
            if loss.numel() != 1 or not loss.requires_grad:
                got = f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
                hint = "Reduce the losses, outside of `torch.no_grad`."
                raise invalid(
                    "CaughtGradients.backward", "loss", "a scalar with a graph", got, hint
                )
        self._turn, self._waiting = 0, {}
        torch.autograd.grad(loss, self._parameters, allow_unused=True)
        self._reduce(finished=True)

    def take(self) -> list[Tensor]:
        """The gradient since the last call, which is forgotten.

        Returns:
            This rank's flat share for each parameter, at least float32, the last parameter first.
        """
        taken, self._shares = self._shares, {}
        return list(taken.values())

    def _caught(self, place: int, gradient: Tensor) -> Tensor:
        self._waiting[place] = gradient
        self._reduce(finished=False)
        # Autograd holds what is returned until the pass ends: a single zero instead of it all.
        return gradient.new_zeros(()).expand_as(gradient)

    def _reduce(self, *, finished: bool) -> None:
        while self._turn < len(self._parameters) and (finished or self._turn in self._waiting):
            place, self._turn = self._turn, self._turn + 1
            share = self._share(self._waiting.pop(place, None), self._parameters[place])
            self._shares[place] = self._shares[place] + share if place in self._shares else share

    def _share(self, gradient: Tensor | None, parameter: Any) -> Tensor:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if gradient is None:
            # ZeRO-3 leaves an empty parameter behind, and its size beside it.
            size = getattr(parameter, "ds_numel", parameter.numel())
            whole = torch.zeros(size, dtype=dtype, device=parameter.device)
        else:
            whole = gradient.flatten().to(dtype, copy=True)
        if self.group is None:
            return whole
        dist.all_reduce(whole, group=self.group)
        ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        return whole.tensor_split(ranks)[rank] / ranks
