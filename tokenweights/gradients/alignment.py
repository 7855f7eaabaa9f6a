"""How far every single token's gradient goes along the gradient of all tokens."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenweights._errors import TokenWeightsError, invalid
from tokenweights._typing import typed
from tokenweights.distributed import agreed, agreement, global_sum
from tokenweights.gradients.differences import (
    central_differences,
    rounding_asks_for_two_steps,
)
from tokenweights.gradients.evaluation import (
    LossEvaluation,
    TokenLoss,
    finite_square,
    taken_gradients,
)
from tokenweights.gradients.forward_mode import forward_derivative
from tokenweights.gradients.preserved import preserved
from tokenweights.gradients.selection import selected_parameters
from tokenweights.gradients.shards import inner_product


@dataclass(frozen=True)
class TokenAlignment:
    r"""Every token's gradient against the full gradient $g = \frac{1}{N} \sum_t g_t$.

    Attributes:
        inner: $\langle g_t, g \rangle$ of each token, float64, 0 off the mask.
        projection_ratio: $\langle g_t, g \rangle / (N \|g\|^2)$ of each token, 0 off the mask: its
            share of Eq. 6. They sum to one over all tokens; NaN if the full gradient is 0.
        full_squared_norm: $\|g\|^2$.
        count: Number of valid tokens $N$, over all ranks.
        sum_error: How far the sum of the projection ratios is from one; with differences, how far
            it was before they were scaled to it.
        step_error: Estimated relative error of `inner` (root mean square over tokens) from a
            comparison of two step sizes; None where only one was needed, and in forward mode.
        step: Factor on the full gradient by which the parameters were moved; 0 in forward mode.
    """

    inner: Float[Tensor, "batch token"]
    projection_ratio: Float[Tensor, "batch token"]
    full_squared_norm: float
    count: int
    sum_error: float
    step_error: float | None
    step: float


@agreed
@typed
def token_alignment(
    token_loss: TokenLoss | Sequence[TokenLoss],
    model: nn.Module,
    *,
    mask: Bool[Tensor, "batch token"],
    method: Literal["differences", "forward", "auto"] = "differences",
    step: float | None = None,
    compare_steps: bool = False,
    tolerance: float = 1e-4,
    pattern: str | None = None,
    layers: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> TokenAlignment:
    r"""Inner product of every token's gradient with the full gradient, for all tokens at once.

    $\langle g_t, g \rangle$ is the derivative of the token's loss along $g$. One backward pass
    gives $g$; `"differences"` then takes $(\ell_t(\theta + h g) - \ell_t(\theta - h g)) / 2h$ from
    two forward passes without a graph, which works with any kernel, with checkpointing and with
    DDP and FSDP2; `"forward"` takes one forward-mode pass, exact, where every kernel allows it.
    `"auto"` takes it where differences would take four passes, which cost as much: where the
    tolerance, or parameters below float32, leave no room for one step, or with `compare_steps`; it
    takes differences if a kernel has no forward mode, or if its own sum is off.

    The step is chosen so that token losses change by a small share of their size. If the
    projection ratios do not sum to one within `tolerance`, up to three more step sizes are tried,
    two forward passes each, and combined (Richardson); if they still do not, this raises. In
    float32 the default usually takes the first two passes only and leaves a relative error of about
    $10^{-4}$ (root mean square over tokens); a `tolerance` of 1e-5 takes two more and leaves about
    $2 \cdot 10^{-5}$, where rounding leaves a step that passes. The check is of one number, which
    a step of your own that is far too small may pass by luck: `compare_steps` tells.
    Since the sum is known exactly from the backward pass, differences that passed are at last
    scaled to it by one common factor, so that the ratios of any partition sum to one. Parameters
    below float32 round the step: give them a larger `tolerance`, or probe in float32.

    Parameters, buffers, gradients and the global random state of torch, Python and NumPy are
    bitwise unchanged afterwards, also after an exception. Memory beside the model: the backward
    pass, then one copy of the parameters, which first holds the gradient and then the values to
    restore.

    Args:
        token_loss: Callable without arguments that computes unreduced losses, `batch token`, from
            the model's current parameters; or one for each micro-batch of consecutive rows.
        model: The module whose parameters the callable uses, with its wrapper if it has one.
        mask: True for valid response tokens.
        method: See above.
        step: $h$, > 0; chosen if None. `"auto"` takes differences with a step of your own.
        compare_steps: Always take a second step size, at two more forward passes, for `step_error`.
        tolerance: Largest distance of the sum of the projection ratios from one, before they are
            scaled to it; below 1.
        pattern: Regular expression; only parameters whose name it is found in.
        layers: Only parameters of these layers.
        group: The ranks that share the batch, each with its own rows.

    Returns:
        One number for each token.

    Raises:
        TokenWeightsError: If the projection ratios do not sum to one, the gradient is not finite, a
            kernel has no forward mode, `tolerance` is not in (0, 1), `step` is not above 0 or moves
            nothing, two parameters to be moved share memory, or the losses are not finite, not
            `batch token`, or without a graph.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> inputs = torch.tensor([[[1.0, 0.0], [1.0, 2.0]]])
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> token_alignment(lambda: model(inputs)[..., 0], model, mask=mask, method="forward").inner
        tensor([[1., 3.]], dtype=torch.float64)
    """
    if not 0 < tolerance < 1:
        raise invalid("token_alignment", "tolerance", "in (0, 1)", tolerance, "Try 1e-4.")
    if step is not None and not 0 < step < math.inf:
        hint = "Leave it out, and one is chosen."
        raise invalid("token_alignment", "step", "finite and > 0", step, hint)
    parameters = list(selected_parameters(model, pattern=pattern, layers=layers).values())
    with preserved("token_alignment", model) as rewind:
        losses = LossEvaluation("token_alignment", token_loss, mask, rewind=rewind, group=group)
        values = losses.backward()
        gradient = taken_gradients(parameters, model)
        full_square = finite_square("token_alignment", inner_product(gradient, gradient))
        if full_square == 0 or losses.count == 0:
            zero = torch.zeros_like(values)
            return TokenAlignment(zero, zero / 0, 0.0, int(losses.count), float("nan"), None, 0.0)

        def ratio_sum(inner: Tensor) -> float:
            return float(global_sum(inner.sum(), group=group)) / (losses.count * full_square)

        def sum_error(inner: Tensor) -> float:
            return abs(ratio_sum(inner) - 1)

        inner, used, step_error = None, 0.0, None
        if method == "forward":
            with agreement("token_alignment", group):
                inner = forward_derivative(losses, parameters, gradient)
        elif method == "auto" and step is None:
            if compare_steps or rounding_asks_for_two_steps(parameters, tolerance):
                inner = _forward_where_exact(
                    losses,
                    parameters,
                    gradient,
                    sum_error=sum_error,
                    tolerance=tolerance,
                    group=group,
                )
        scaled = inner is None
        if inner is None:
            inner, used, step_error = central_differences(
                losses,
                parameters,
                gradient,
                values,
                full_square=full_square,
                step=step,
                compare_steps=compare_steps,
                sum_error=sum_error,
                tolerance=tolerance,
                group=group,
            )
    total = ratio_sum(inner)
    error = abs(total - 1)
    if not error <= tolerance:
        raise invalid(
            "token_alignment",
            "token_loss",
            f"with projection ratios that sum to one within {tolerance}",
            f"an error of {error:.2e}",
            "Is it a function of the parameters and of torch's random state alone? Low precision "
            "needs a larger `tolerance`; several ranks need `group`.",
        )
    if scaled:
        inner = inner / total
    return TokenAlignment(
        inner=inner,
        projection_ratio=inner / (losses.count * full_square),
        full_squared_norm=full_square,
        count=int(losses.count),
        sum_error=error,
        step_error=step_error,
        step=used,
    )


def _forward_where_exact(
    losses: LossEvaluation,
    parameters: Sequence[Tensor],
    gradient: Sequence[Tensor],
    *,
    sum_error: Callable[[Tensor], float],
    tolerance: float,
    group: dist.ProcessGroup | None,
) -> Tensor | None:
    """The derivative in forward mode, or None on all ranks where it fails on one."""
    try:
        inner = forward_derivative(losses, parameters, gradient)
    except (TokenWeightsError, NotImplementedError, RuntimeError):
        # A loss that fails for another reason fails again, and says so, in the differences.
        inner = None
    failed = torch.tensor(float(inner is None), device=parameters[0].device)
    failures = float(global_sum(failed, group=group))
    if inner is None or failures or not sum_error(inner) <= tolerance:
        return None
    return inner
