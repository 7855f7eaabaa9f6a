"""The gradient of every group of a partition, by one backward pass for each."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.losses import Denominator, weighted_token_mean


@dataclass(frozen=True)
class GroupGradients:
    """Gradients of the groups of a partition, each a tuple of tensors shaped like the parameters.

    Attributes:
        groups: One gradient for each group, in the order of the group numbers.
        total: The gradient of the mean over all valid tokens.
    """

    groups: tuple[tuple[Tensor, ...], ...]
    total: tuple[Tensor, ...]


@typed
def group_gradients(
    token_loss: Float[Tensor, "batch token"],
    groups: Int[Tensor, "batch token"],
    parameters: Iterable[Tensor],
    *,
    mask: Bool[Tensor, "batch token"],
    denominator: Denominator = "all_tokens",
) -> GroupGradients:
    """Gradients of each group's share of the loss, and of the whole loss.

    Under `"all_tokens"` a group's loss is its tokens' sum divided by the number of all valid tokens
    (Eq. 25), so the gradients of a partition add up to the total. Under `"selected_tokens"` it is
    the mean over the group (Eq. 24). The graph of `token_loss` is kept; one backward pass runs for
    each group and one for the total, and as many copies of the parameters are returned.

    Args:
        token_loss: Unreduced losses with a graph.
        groups: Group number of each token, from 0; -1 for tokens in no group.
        parameters: Tensors to differentiate by; those that need no gradient are left out.
        mask: True for valid response tokens.
        denominator: What each group's loss divides by.

    Returns:
        Gradients; zeros where a parameter does not enter the loss.

    Raises:
        TokenWeightsError: If `token_loss` has no graph, no parameter needs a gradient, or a group
            number is below -1.

    Example:
        >>> parameter = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> token_loss = (parameter * torch.tensor([2.0, 4.0]))[None]
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> gradients = group_gradients(token_loss, torch.tensor([[0, 1]]), [parameter], mask=mask)
        >>> gradients.groups[1], gradients.total
        ((tensor([0., 2.]),), (tensor([1., 2.]),))
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not wanted:
        raise invalid(
            "group_gradients",
            "parameters",
            "with a tensor that requires a gradient",
            "none",
            "Pass `model.parameters()`.",
        )
    if not token_loss.requires_grad:
        raise invalid(
            "group_gradients",
            "token_loss",
            "with a graph",
            "a tensor that requires no gradient",
            "Compute it outside `torch.no_grad`.",
        )

    def gradient(subset: Tensor) -> tuple[Tensor, ...]:
        loss = weighted_token_mean(
            token_loss, mask, subset.to(token_loss.dtype), denominator=denominator
        )
        return torch.autograd.grad(
            loss, wanted, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    valid = groups[mask]
    if valid.numel() and valid.min() < -1:
        hint = "-1 stands for no group."
        raise invalid("group_gradients", "groups", ">= -1", int(valid.min()), hint)
    count = int(valid.max()) + 1 if valid.numel() else 0
    return GroupGradients(
        groups=tuple(gradient(groups == number) for number in range(count)),
        total=gradient(torch.ones_like(mask)),
    )
