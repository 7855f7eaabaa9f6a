"""The numbers every adapter logs about a batch's token weights."""

import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._errors import refused_by
from tokenweights._typing import typed
from tokenweights.diagnostics.dynamics import local_dynamics
from tokenweights.distributed import agreed
from tokenweights.masked import require_weights
from tokenweights.partition import bottom_fraction, top_fraction


@agreed
@typed
def token_weight_metrics(
    scores: Float[Tensor, "batch token"] | None,
    weights: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    fraction: float = 0.2,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    r"""Weights and scores of a batch in a few numbers, exact over ranks.

    | key | meaning |
    |---|---|
    | `weight_mean` | mean weight of the valid tokens |
    | `effective_sample_size` | $(\sum w)^2 / \sum w^2$ as a share of the valid tokens |
    | `anchor_share`, `explorer_share` | share of the total weight on them |
    | `entropy_mean`, `entropy_std` | of the scores over all valid tokens |
    | `anchor_entropy_mean`, `..._std`, `explorer_entropy_mean`, `..._std` | over each group |

    Anchors are the bottom, explorers the top `fraction` of each response by score, whatever rule
    made the weights.

    Args:
        scores: The scores behind the weights, finite under the mask; None if there are none, and
            then only the first two keys are returned.
        weights: Weights >= 0.
        mask: True for valid response tokens.
        fraction: Share of each response that makes up anchors, and explorers, in [0, 1].
        group: The ranks that share the batch.

    Returns:
        Python floats, the same on every rank; empty if the batch has no valid token, so that an
        empty batch never enters an average as zeros.

    Raises:
        TokenWeightsError: If a valid weight is negative or not finite, a valid score is not finite,
            or `fraction` is outside [0, 1].

    Example:
        >>> mask = torch.ones(1, 5, dtype=torch.bool)
        >>> scores = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]])
        >>> metrics = token_weight_metrics(scores, torch.tensor([[1.0, 0.0, 0.0, 0.0, 3.0]]), mask)
        >>> metrics["weight_mean"], metrics["anchor_share"], metrics["explorer_share"]
        (0.8, 0.25, 0.75)
    """
    require_weights("token_weight_metrics", weights, mask)
    names, groups = ("",), [mask]
    if scores is not None:
        names = ("", "anchor_", "explorer_")
        with refused_by("token_weight_metrics"):
            groups += [
                bottom_fraction(scores, mask, fraction=fraction),
                top_fraction(scores, mask, fraction=fraction),
            ]
    weight = local_dynamics(weights, groups).over_ranks(group)
    # Entered by every rank, with or without tokens of its own.
    score = None if scores is None else local_dynamics(scores, groups).over_ranks(group)
    if weight.count[0] == 0:
        return {}
    mass = weight.count * weight.mean
    squares = weight.count[0] * (weight.std[0].square() + weight.mean[0].square())
    metrics = {
        "weight_mean": weight.mean[0],
        "effective_sample_size": mass[0].square() / squares.where(squares > 0, 1) / weight.count[0],
    }
    if score is not None:
        for place, name in enumerate(names):
            if name:
                metrics[f"{name}share"] = mass[place] / mass[0].where(mass[0] > 0, 1)
            metrics[f"{name}entropy_mean"] = score.mean[place]
            metrics[f"{name}entropy_std"] = score.std[place]
    return {name: float(value) for name, value in metrics.items()}
