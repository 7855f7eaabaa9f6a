"""How two scores of the same tokens go together."""

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._typing import typed
from tokenweights.diagnostics.moments import local_moments
from tokenweights.distributed import agreed
from tokenweights.masked import accumulator_dtype, masked_ranks, require_finite


@agreed
@typed
def pearson_correlation(
    first: Float[Tensor, "batch token"],
    second: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Pearson correlation of two scores over all valid tokens of the batch, in [-1, 1].

    Means are merged first and products of deviations second, in float64, so a large common offset
    costs no digits. `score_moments` gives the same for several scores at once, and merges over
    micro-batches.

    Args:
        first: One score for each token, finite under the mask.
        second: Another score.
        mask: True for valid response tokens.
        group: The ranks that share the batch.

    Returns:
        A detached scalar, the same on every rank; NaN if a score is constant or there is no token.

    Raises:
        TokenWeightsError: If a valid score is not finite.

    Example:
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> pearson_correlation(torch.tensor([[1.0, 2, 3]]), torch.tensor([[2.0, 4, 6]]), mask)
        tensor(1., dtype=torch.float64)
    """
    require_finite("pearson_correlation", "first", first, mask)
    require_finite("pearson_correlation", "second", second, mask)
    moments = local_moments(torch.stack([first, second]), mask).over_ranks(group)
    return moments.correlation[0, 1]


@agreed
@typed
def rank_correlation(
    first: Float[Tensor, "batch token"],
    second: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Pearson correlation of the scores' within-response ranks, over all responses, in [-1, 1].

    Ranks are scaled to [-1/2, 1/2] in each response, so long and short responses weigh by their
    tokens only. Equal scores are ranked by position. `layer_agreement` gives the same for several
    layers at once, and merges over micro-batches.

    Args:
        first: One score for each token, finite under the mask.
        second: Another score.
        mask: True for valid response tokens.
        group: The ranks that share the batch.

    Returns:
        A detached scalar, the same on every rank; NaN if no response has two tokens.

    Raises:
        TokenWeightsError: If a valid score is not finite.

    Example:
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> rank_correlation(torch.tensor([[1.0, 2, 9]]), torch.tensor([[4.0, 2, 1]]), mask)
        tensor(-1., dtype=torch.float64)
    """
    require_finite("rank_correlation", "first", first, mask)
    require_finite("rank_correlation", "second", second, mask)
    several = mask & (mask.sum(-1, keepdim=True) > 1)
    ranks = torch.stack([scaled_ranks(first, mask), scaled_ranks(second, mask)])
    return local_moments(ranks, several).over_ranks(group).correlation[0, 1]


def scaled_ranks(scores: Tensor, mask: Tensor) -> Tensor:
    """Within-response ranks from -1/2 for the lowest score to 1/2 for the highest."""
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=1).to(accumulator_dtype(mask.device))
    return masked_ranks(scores, mask) / last - 0.5
