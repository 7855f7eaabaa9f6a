"""How far subsets of tokens coincide (Appendix E)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.diagnostics.additive import Additive
from tokenweights.distributed import agreed
from tokenweights.masked import accumulator_dtype


@dataclass(frozen=True)
class SubsetOverlap(Additive):
    """Tokens that subsets have in common, over the whole batch.

    Attributes:
        common: Number of tokens in both of each pair; on the diagonal, of each subset.
    """

    common: Float[Tensor, "layers layers"]

    @property
    def jaccard(self) -> Float[Tensor, "layers layers"]:
        """Tokens in both over tokens in either, in [0, 1]; NaN where both subsets are empty."""
        sizes = self.common.diagonal()
        return self.common / (sizes + sizes[:, None] - self.common)


@agreed
@typed
def subset_overlap(
    subsets: Sequence[Bool[Tensor, "batch token"]],
    mask: Bool[Tensor, "batch token"],
    *,
    group: dist.ProcessGroup | None = None,
) -> SubsetOverlap:
    r"""Common tokens of every pair of subsets, and their Jaccard overlaps, mergeable.

    Two random subsets of a share $f$ of the tokens have a Jaccard overlap near $f / (2 - f)$: 0.11
    for 20 %.

    Args:
        subsets: Masks of subsets, for example the anchors of several layers.
        mask: True for valid response tokens; others are in no subset.
        group: The ranks that share the batch.

    Returns:
        Counts over the whole batch, the same on every rank.

    Raises:
        TokenWeightsError: If there is no subset.

    Example:
        >>> mask = torch.ones(1, 4, dtype=torch.bool)
        >>> first = torch.tensor([[True, True, False, False]])
        >>> second = torch.tensor([[True, False, True, True]])
        >>> subset_overlap([first, second], mask).jaccard.tolist()
        [[1.0, 0.25], [0.25, 1.0]]
    """
    if not subsets:
        raise invalid("subset_overlap", "subsets", "with a mask", "none", "Pass at least one.")
    return local_overlap(torch.stack(list(subsets)), mask).over_ranks(group)


@agreed
@typed
def partition_jaccard(
    first: Bool[Tensor, "batch token"],
    second: Bool[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    r"""Jaccard overlap $|A \cap B| / |A \cup B|$ of two subsets of the batch's tokens, in [0, 1].

    Tokens of all responses are counted together. See `subset_overlap` for what chance gives, for
    more than two subsets, and for merging micro-batches.

    Args:
        first: A subset of the tokens, for example the anchors of one layer.
        second: Another, for example those of the next layer.
        mask: True for valid response tokens; others are in no subset.
        group: The ranks that share the batch.

    Returns:
        A detached scalar, the same on every rank; NaN if both subsets are empty.

    Example:
        >>> mask = torch.ones(1, 4, dtype=torch.bool)
        >>> first = torch.tensor([[True, True, False, False]])
        >>> second = torch.tensor([[True, False, True, True]])
        >>> partition_jaccard(first, second, mask)
        tensor(0.2500, dtype=torch.float64)
    """
    return subset_overlap([first, second], mask, group=group).jaccard[0, 1]


def local_overlap(subsets: Tensor, mask: Tensor) -> SubsetOverlap:
    """Counts of this rank's tokens; `subsets` is `layers batch token`."""
    members = (subsets & mask).flatten(1)
    dtype = accumulator_dtype(mask.device)
    # One subset at a time: a product of the float masks would hold all of them in float64.
    common = [(members & one).sum(1).to(dtype) for one in members]
    return SubsetOverlap(torch.stack(common))
