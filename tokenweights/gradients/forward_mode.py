"""Derivatives of token losses along a direction in parameter space, by forward-mode AD."""

import warnings
from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights.gradients.evaluation import LossEvaluation


def forward_derivative(
    losses: LossEvaluation, parameters: Sequence[Tensor], direction: Sequence[Tensor]
) -> Tensor:
    """The derivative of every token loss along a direction, from one pass.

    Args:
        losses: The token losses.
        parameters: Plain tensors.
        direction: Tensors of their shapes.

    Returns:
        Derivatives in float64, 0 off the mask.

    Raises:
        TokenWeightsError: If a kernel has no forward mode, or a parameter is a DTensor.
    """
    hint = "Use method='differences', or kernels with a forward mode such as eager attention."
    if any(hasattr(parameter, "device_mesh") for parameter in parameters):
        raise invalid("token_alignment", "method", "'differences' for DTensors", "'forward'", hint)
    with forward_ad.dual_level(), torch.no_grad():
        with warnings.catch_warnings():  # torch's own first use of forward mode warns of torch.jit
            warnings.simplefilter("ignore", DeprecationWarning)
            for parameter, tangent in zip(parameters, direction, strict=True):
                # Copying a parameter onto itself leaves its values and gives it the tangent, until
                # the level ends.
                parameter.copy_(forward_ad.make_dual(parameter.detach(), tangent))
        try:
            parts = losses.parts()
        except (NotImplementedError, RuntimeError) as error:
            if "forward AD" not in str(error) and "jvp" not in str(error):
                raise
            reason = f"'forward', where {str(error).splitlines()[0].rstrip('.')}"
            raise invalid("token_alignment", "method", "'differences'", reason, hint) from error
        tangents = [forward_ad.unpack_dual(part).tangent for part in parts]
        return losses.joined(
            [
                torch.zeros_like(part) if tangent is None else tangent
                for part, tangent in zip(parts, tangents, strict=True)
            ]
        )
