"""Derivatives of token losses along a direction in parameter space, by central differences."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights.distributed import global_sum
from tokenweights.gradients.displacement import Displacement
from tokenweights.gradients.evaluation import LossEvaluation

# Step sizes tried after the first, two forward passes each.
MORE_STEPS = 3


def central_differences(
    losses: LossEvaluation,
    parameters: Sequence[Tensor],
    gradient: Sequence[Tensor],
    values: Tensor,
    *,
    full_square: float,
    step: float | None,
    compare_steps: bool,
    sum_error: Callable[[Tensor], float],
    tolerance: float,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, float, float | None]:
    r"""The derivative of every token loss along the full gradient.

    The quotient divides by the way the parameters really went, not by the one they were sent. Two
    step sizes cancel the first term of the truncation (Richardson).

    Args:
        losses: The token losses.
        parameters: Parameters to move; their values are restored.
        gradient: The direction, consumed.
        values: Token losses at the present parameters.
        full_square: Squared norm of the gradient.
        step: Factor on the gradient; chosen if None.
        compare_steps: Take a second step size in any case.
        sum_error: How far derivatives are from the sum that is known; the same on every rank.
        tolerance: Largest sum error with which no further step size is tried.
        group: The ranks that share the batch.

    Returns:
        Derivatives, the step, and the relative difference of two step sizes' results or None.

    Raises:
        TokenWeightsError: If parameters share memory, or their precision rounds the step away.
    """
    tokens = losses.count**0.5
    # Losses that are all 0, as log-ratios at their own policy, have no size: take that of one nat.
    wanted = _share(parameters, tolerance) * (_root_sum_square(values, group) or tokens)

    with torch.no_grad(), Displacement(parameters, gradient) as displacement:
        # A first guess: tokens move about twice as much as their mean, which moves by step * |g|^2.
        used = wanted / tokens / full_square / 2 if step is None else step
        went = displacement.start(used) / full_square
        if not went > 0:
            hint = "Their precision rounds it away: pass a larger one, or probe in float32."
            raise invalid("token_alignment", "step", "that moves the parameters", used, hint)

        def difference(factor: float) -> Tensor:
            displacement.move_to(factor)
            plus = losses.values()
            displacement.move_to(-factor)
            return (plus - losses.values()) / (2 * factor * went)

        small, large = 1.0, 1.0
        fine = coarse = best = difference(1.0)
        if sum_error(best) <= tolerance:
            error = _relative_distance(difference(0.5), best, group) if compare_steps else None
            return best, used, error
        error = None
        for _ in range(MORE_STEPS):
            # Where a smaller step was no better, it is rounding that has to be fought.
            grows = small < large and sum_error(fine) >= sum_error(coarse)
            if grows:
                small, fine = large, coarse
                large, coarse = 2 * large, difference(2 * large)
            else:
                large, coarse = small, fine
                small, fine = small / 2, difference(small / 2)
            combined = (4 * fine - coarse) / 3
            if sum_error(combined) < sum_error(best):
                best, error = combined, _relative_distance(fine, combined, group)
            if sum_error(best) <= tolerance:
                break
        return best, used * small, error


def rounding_asks_for_two_steps(parameters: Sequence[Tensor], tolerance: float) -> bool:
    """Whether rounding leaves no room for a single step size within `tolerance`."""
    return _share_at_once(tolerance) <= _rounding_share(parameters) / 2


def _share(parameters: Sequence[Tensor], tolerance: float) -> float:
    r"""The share of its size by which a step should change the loss of a token.

    Truncation grows as $h^2$ and rounding as $\epsilon / h$; they balance near half the cube root
    of $\epsilon$. More than the cube root would only lose precision. If rounding leaves no room,
    two larger steps are combined.
    """
    rounding = _rounding_share(parameters)
    if rounding_asks_for_two_steps(parameters, tolerance):
        return 4 * rounding
    return min(_share_at_once(tolerance), rounding)


def _share_at_once(tolerance: float) -> float:
    """The share that mostly passes at once, if rounding leaves room for it."""
    return 0.3 * tolerance**0.5


def _rounding_share(parameters: Sequence[Tensor]) -> float:
    # Parts of a float64 model may still compute in float32.
    dtypes = {torch.float32, *(parameter.dtype for parameter in parameters)}
    return max(torch.finfo(dtype).eps for dtype in dtypes) ** (1 / 3)


def _root_sum_square(values: Tensor, group: dist.ProcessGroup | None) -> float:
    return float(global_sum(values.square().sum(), group=group)) ** 0.5


def _relative_distance(first: Tensor, second: Tensor, group: dist.ProcessGroup | None) -> float:
    return _root_sum_square(first - second, group) / _root_sum_square(second, group)
