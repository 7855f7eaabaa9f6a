"""Means and products of deviations of several scores of the same tokens: what correlations need."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._typing import typed
from tokenweights.diagnostics.additive import alike
from tokenweights.distributed import agreed, global_sum, merge
from tokenweights.masked import accumulator_dtype, require_finite, row_chunks


@dataclass(frozen=True)
class ScoreMoments:
    """First and second moments of several scores of the same tokens, in float64.

    Attributes:
        count: Number of tokens.
        mean: Mean of each score; 0 without a token.
        products: Sums of products of the deviations from the means.
    """

    count: Float[Tensor, ""]
    mean: Float[Tensor, " layers"]
    products: Float[Tensor, "layers layers"]

    @property
    def correlation(self) -> Float[Tensor, "layers layers"]:
        """Pearson correlations, in [-1, 1]; NaN where a score is constant or there is no token."""
        squares = self.products.diagonal()
        # The mean of equal values is rounded, so their deviations need not be zero.
        rounding = 64 * torch.finfo(squares.dtype).eps * self.mean
        constant = squares <= self.count * rounding.square()
        # The product of two squares may leave the range of a float; a power of two is exact.
        unit = torch.exp2(torch.frexp(squares.sqrt()).exponent.to(squares.dtype))
        spread = torch.where(constant, torch.nan, squares / unit / unit)
        products = self.products / unit / unit[:, None]
        return (products / (spread * spread[:, None]).sqrt()).clamp(-1, 1)

    @typed
    def merged(self, other: "ScoreMoments") -> "ScoreMoments":
        """The moments of both parts of a batch.

        Args:
            other: Moments of the same scores of other tokens.

        Returns:
            A new record.

        Raises:
            TokenWeightsError: If the number of scores differs.
        """
        alike(self, other)
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        apart = other.mean - self.mean
        between = torch.outer(apart, apart) * self.count * share
        return ScoreMoments(
            count, self.mean + apart * share, self.products + other.products + between
        )

    @merge
    @typed
    def over_ranks(self, group: dist.ProcessGroup | None) -> "ScoreMoments":
        """The moments of the whole batch, in two reductions.

        Args:
            group: The ranks that share the batch, all of which have to call; None leaves the
                record as it is.

        Returns:
            The same record on every rank.
        """
        own = torch.cat([self.count[None], self.count * self.mean])
        count, *totals = global_sum(own, group=group)
        mean = torch.stack(totals) / count.clamp(min=1) if totals else self.mean
        apart = self.mean - mean
        products = self.products + self.count * torch.outer(apart, apart)
        return ScoreMoments(count, mean, global_sum(products, group=group))


@agreed
@typed
def score_moments(
    scores: Float[Tensor, "layers batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    group: dist.ProcessGroup | None = None,
) -> ScoreMoments:
    """Moments of several scores over all valid tokens: correlations of every pair, mergeable.

    Products are taken of deviations from the mean, so a large common offset costs no digits. The
    scores may be those of several layers, or of several heads, or attention and predictive entropy
    (Appendix F.2). Extra memory is tens of thousands of tokens of each score.

    Args:
        scores: Several scores for each token, finite under the mask.
        mask: True for valid response tokens.
        group: The ranks that share the batch.

    Returns:
        Moments over the whole batch, detached, the same on every rank.

    Raises:
        TokenWeightsError: If a valid score is not finite.

    Example:
        >>> scores = torch.tensor([[[1.0, 2.0, 3.0]], [[6.0, 4.0, 2.0]]])
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> whole = score_moments(scores, mask)
        >>> whole.correlation.tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
        >>> parts = [score_moments(scores[:, :, s], mask[:, s]) for s in (slice(2), slice(2, 3))]
        >>> torch.allclose(parts[0].merged(parts[1]).products, whole.products)
        True
    """
    for score in scores:
        require_finite("score_moments", "scores", score, mask)
    return local_moments(scores, mask).over_ranks(group)


def local_moments(scores: Tensor, mask: Tensor) -> ScoreMoments:
    """Moments of this rank's tokens, a few rows at a time."""
    dtype = accumulator_dtype(scores.device)
    layers = len(scores)
    zero = torch.zeros((), dtype=dtype, device=scores.device)
    moments = ScoreMoments(zero, zero.expand(layers), zero.expand(layers, layers))
    for rows in row_chunks(mask.shape):
        values = scores.detach()[:, rows][:, mask[rows]].to(dtype)
        count = zero + values.shape[1]
        mean = values.sum(1) / count.clamp(min=1)
        apart = values - mean[:, None]
        moments = moments.merged(ScoreMoments(count, mean, apart @ apart.T))
    return moments
