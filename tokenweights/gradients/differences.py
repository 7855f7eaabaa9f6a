"""Derivatives of token losses along a direction in parameter space, by central differences."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tokenweights.distributed import global_sum
from tokenweights.gradients.displacement import Displacement
from tokenweights.gradients.evaluation import LossEvaluation

# A step that changes token losses by more than this many times the wanted share is taken again.
OVERSHOOT = 4.0


def central_differences(
    losses: LossEvaluation,
    parameters: Sequence[Tensor],
    gradient: Sequence[Tensor],
    values: Tensor,
    *,
    full_square: float,
    step: float | None,
    compare_steps: bool,
    accepted: Callable[[Tensor], bool],
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, float, float | None]:
    r"""The derivative of every token loss along the full gradient.

    The error of a central difference is a truncation of order $h^2$ and a rounding of order
    $\epsilon / h$, least where the losses change by about $\epsilon^{1/3}$ of their size. The
    quotient divides by the way the parameters really went, not by the one they were sent.

    Args:
        losses: The token losses.
        parameters: Parameters to move; their values are restored.
        gradient: The direction, consumed.
        values: Token losses at the present parameters.
        full_square: Squared norm of the gradient.
        step: Factor on the gradient; chosen if None.
        compare_steps: Take a second step size in any case.
        accepted: Whether derivatives pass the sum check; the same answer on every rank.
        group: The ranks that share the batch.

    Returns:
        Derivatives, the step, and the relative difference of two step sizes' results or None.
    """
    # Parts of a float64 model may still compute in float32.
    dtypes = {torch.float32, *(parameter.dtype for parameter in parameters)}
    epsilon = max(torch.finfo(dtype).eps for dtype in dtypes)
    wanted = 2 * epsilon ** (1 / 3) * _root_sum_square(values, group)
    tokens = losses.count**0.5

    with torch.no_grad(), Displacement(parameters, gradient) as displacement:
        # A first guess: as if every token moved as the mean does, by step * |g|^2.
        used = wanted / tokens / full_square if step is None else step
        went = displacement.start(used) / full_square

        def difference(factor: float) -> Tensor:
            displacement.move_to(factor)
            plus = losses.values()
            displacement.move_to(-factor)
            return (plus - losses.values()) / (2 * factor)

        base = 1.0
        first = difference(base)
        change = _root_sum_square(first, group)
        if step is None and change > OVERSHOOT * wanted:
            base = wanted / change
            first = difference(base)
        best, error = first, None
        if accepted(first / went):
            if compare_steps:
                error = _relative_distance(difference(base / 2), first, group)
            return first / went, used * base, error
        # A smaller step against truncation, then a larger one against rounding.
        for factor in (0.5, 2.0):
            second = difference(factor * base)
            fine, coarse = (second, first) if factor < 1 else (first, second)
            best = (4 * fine - coarse) / 3
            error = _relative_distance(fine, best, group)
            if accepted(best / went):
                break
        return best / went, used * base, error


def _root_sum_square(values: Tensor, group: dist.ProcessGroup | None) -> float:
    return float(global_sum(values.square().sum(), group=group)) ** 0.5


def _relative_distance(first: Tensor, second: Tensor, group: dist.ProcessGroup | None) -> float:
    return _root_sum_square(first - second, group) / _root_sum_square(second, group)
