"""Token losses as a function of the parameters, evaluated again and again under the same noise."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenweights._errors import invalid
from tokenweights.distributed import agreement
from tokenweights.gradients.preserved import in_bucket
from tokenweights.losses import loss_denominator, weighted_token_mean
from tokenweights.masked import accumulator_dtype, require_finite

TokenLoss = Callable[[], Tensor]


class LossEvaluation:
    """Values and gradients of token losses that come in consecutive micro-batches of rows.

    An error in a callable of one rank ends the evaluation on all ranks of the group, unless the
    others already wait in a collective of the model's own wrapper.

    Attributes:
        count: Number of valid tokens over the group.
    """

    def __init__(
        self,
        function: str,
        token_loss: TokenLoss | Sequence[TokenLoss],
        mask: Tensor,
        *,
        rewind: Callable[[], None],
        group: dist.ProcessGroup | None,
    ):
        self._function = function
        self._parts = [token_loss] if callable(token_loss) else list(token_loss)
        if not self._parts:
            hint = "Pass one callable for each micro-batch of rows."
            raise invalid(function, "token_loss", "with a callable", "none", hint)
        self._mask = mask
        self._rewind = rewind
        self._group = group
        # Wrappers average gradients over the ranks that share the batch; here they add up.
        self._ranks = 1 if group is None else group.size()
        self.count = float(loss_denominator(mask, group=group))

    def values(self) -> Tensor:
        """Token losses at the current parameters, in float64, 0 off the mask; no graph."""
        with torch.no_grad(), self._agreement():
            return self.joined(self.parts())

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Micro-batches of losses as one detached tensor in float64, 0 off the mask."""
        wide = accumulator_dtype(self._mask.device)
        values = torch.cat([part.detach().to(self._mask.device, wide) for part in parts])
        if values.shape != self._mask.shape:
            raise invalid(
                self._function,
                "token_loss",
                f"for all rows of the mask {tuple(self._mask.shape)}",
                tuple(values.shape),
                "Pass one callable for each micro-batch of rows.",
            )
        require_finite(self._function, "token_loss", values, self._mask)
        return torch.where(self._mask, values, 0.0)

    def parts(self) -> list[Tensor]:
        """Token losses of each micro-batch, as the callables return them."""
        self._rewind()
        parts, rows = [], 0
        for part in self._parts:
            parts.append(part())
            rows += self._checked(parts[-1], rows)
        return parts

    def backward(
        self,
        weights: Tensor | None = None,
        *,
        denominator: float | None = None,
        run: Callable[[Tensor], None] = Tensor.backward,
    ) -> Tensor:
        """Adds the gradient of a weighted token mean to every `.grad`.

        Args:
            weights: Token weights; all 1 if None.
            denominator: What the weighted sum is divided by; the number of valid tokens if None.
            run: The backward pass.

        Returns:
            The token losses, as `values` gives them.
        """
        count = self.count if denominator is None else denominator
        self._rewind()
        parts, rows = [], 0
        for part in self._parts:
            with self._agreement():  # before the backward pass, in which wrappers reduce gradients
                loss = part()
                there = slice(rows, rows + self._checked(loss, rows))
                if not loss.requires_grad:
                    raise invalid(
                        self._function,
                        "token_loss",
                        "to return losses with a graph",
                        "a tensor that requires no gradient",
                        "Compute them outside `torch.no_grad`.",
                    )
            own = None if weights is None else weights[there].to(loss.dtype)
            run(weighted_token_mean(loss, self._mask[there], own, count=count) * self._ranks)
            parts.append(loss.detach())
            rows = there.stop
        with self._agreement():
            return self.joined(parts)

    def _agreement(self) -> AbstractContextManager[None]:
        return agreement(self._function, self._group)

    def _checked(self, loss: Tensor, start: int) -> int:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        rows = len(loss) if isinstance(loss, Tensor) and loss.dim() == 2 else 0
        if shape != tuple(self._mask[start : start + rows].shape):
            raise invalid(
                self._function,
                "token_loss",
                f"to return `batch token` losses, rows of the mask {tuple(self._mask.shape)}",
                shape,
                "Return unreduced losses; several callables cover consecutive rows of the mask.",
            )
        return rows


def finite_square(function: str, square: float) -> float:
    """The squared norm of a full gradient, or an error where it has none.

    Args:
        function: Name of the public function, for the error.
        square: The squared norm; the same on every rank.

    Returns:
        `square`.

    Raises:
        TokenWeightsError: If it is NaN or infinite.
    """
    if not math.isfinite(square):
        hint = "A loss is finite but not its derivative: mask that token, or probe in float32."
        raise invalid(function, "token_loss", "with a finite gradient", square, hint)
    return square


def taken_gradients(parameters: Sequence[Tensor], model: nn.Module) -> list[Tensor]:
    """The gradients of some parameters, taken away from the model, zeros where there is none.

    Args:
        parameters: Parameters to read.
        model: All of its `.grad` are None afterwards.

    Returns:
        Tensors with memory of their own.
    """
    taken = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        elif gradient.layout != torch.strided:
            gradient = gradient.to_dense().to(parameter.dtype)
        elif in_bucket(gradient) or gradient.dtype != parameter.dtype:
            gradient = gradient.to(parameter.dtype, copy=True)
        taken.append(gradient.detach())
    for parameter in model.parameters():
        parameter.grad = None
    return taken
