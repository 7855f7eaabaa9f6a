"""Whether layers, or heads, tell the same tokens apart (Appendix E)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._errors import invalid, refused_by
from tokenweights._typing import typed
from tokenweights.diagnostics.correlation import scaled_ranks
from tokenweights.diagnostics.moments import ScoreMoments, local_moments
from tokenweights.diagnostics.overlap import SubsetOverlap, local_overlap
from tokenweights.distributed import agreed, merge
from tokenweights.masked import require_finite, row_chunks
from tokenweights.partition import bottom_fraction, top_fraction


@dataclass(frozen=True)
class LayerAgreement:
    """Agreement of every pair of layers, or of heads, over the tokens of a batch.

    Attributes:
        anchors: Overlaps of the lowest-scored tokens.
        explorers: Overlaps of the highest-scored tokens.
        ranks: Moments of the within-response ranks, scaled to [-1/2, 1/2].
    """

    anchors: SubsetOverlap
    explorers: SubsetOverlap
    ranks: ScoreMoments

    @property
    def anchor_jaccard(self) -> Float[Tensor, "layers layers"]:
        """Jaccard overlap of the anchors, in [0, 1]; NaN without a token."""
        return self.anchors.jaccard

    @property
    def explorer_jaccard(self) -> Float[Tensor, "layers layers"]:
        """Jaccard overlap of the explorers, in [0, 1]; NaN without a token."""
        return self.explorers.jaccard

    @property
    def rank_correlation(self) -> Float[Tensor, "layers layers"]:
        """As the function `rank_correlation`, in [-1, 1]; NaN if no response has two tokens."""
        return self.ranks.correlation

    @typed
    def merged(self, other: "LayerAgreement") -> "LayerAgreement":
        """The agreement over both parts of a batch.

        Args:
            other: Agreement of the same layers over other responses.

        Returns:
            A new record.

        Raises:
            TokenWeightsError: If the number of layers differs.
        """
        return LayerAgreement(
            self.anchors.merged(other.anchors),
            self.explorers.merged(other.explorers),
            self.ranks.merged(other.ranks),
        )

    @merge
    @typed
    def over_ranks(self, group: dist.ProcessGroup | None) -> "LayerAgreement":
        """The agreement over the whole batch.

        Args:
            group: The ranks that share the batch, all of which have to call; None leaves the
                record as it is.

        Returns:
            The same record on every rank.
        """
        return LayerAgreement(
            self.anchors.over_ranks(group),
            self.explorers.over_ranks(group),
            self.ranks.over_ranks(group),
        )


@agreed
@typed
def layer_agreement(
    scores: Float[Tensor, "layers batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    fraction: float = 0.2,
    group: dist.ProcessGroup | None = None,
) -> LayerAgreement:
    """Do layers find the same anchors and explorers, and rank tokens alike? `layers layers` each.

    The check of Appendix E. High values among neighbouring middle layers support a fixed probed
    layer; low values say that other layers see other support. Any scores of the same tokens will
    do in place of layers: heads, from `heads="none"`, or entropy kinds.

    Args:
        scores: Scores of each layer, finite under the mask.
        mask: True for valid response tokens.
        fraction: Share of each response that makes up anchors, and explorers, in [0, 1].
        group: The ranks that share the batch.

    Returns:
        Jaccard overlaps and rank correlations over the whole batch, the same on every rank.

    Raises:
        TokenWeightsError: If there is no layer, a valid score is not finite, or `fraction` is
            outside [0, 1].

    Example:
        >>> scores = torch.tensor([[[0.1, 0.2, 0.3, 0.4]], [[0.1, 0.3, 0.2, 0.4]]])
        >>> agreement = layer_agreement(scores, torch.ones(1, 4, dtype=torch.bool), fraction=0.5)
        >>> round(agreement.anchor_jaccard[0, 1].item(), 3)
        0.333
        >>> round(agreement.rank_correlation[0, 1].item(), 3)
        0.8
    """
    if not len(scores):
        raise invalid("layer_agreement", "scores", "of a layer", "none", "Pass at least one.")
    for layer in scores:
        require_finite("layer_agreement", "scores", layer, mask)
    with refused_by("layer_agreement"):
        parts = [_local(scores[:, rows], mask[rows], fraction) for rows in row_chunks(mask.shape)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merged(part)
    return whole.over_ranks(group)


def _local(scores: Tensor, mask: Tensor, fraction: float) -> LayerAgreement:
    anchors = torch.stack([bottom_fraction(layer, mask, fraction=fraction) for layer in scores])
    explorers = torch.stack([top_fraction(layer, mask, fraction=fraction) for layer in scores])
    ranks = torch.stack([scaled_ranks(layer, mask) for layer in scores])
    return LayerAgreement(
        local_overlap(anchors, mask),
        local_overlap(explorers, mask),
        local_moments(ranks, mask & (mask.sum(-1, keepdim=True) > 1)),
    )
