"""Which tokens stand in which quadrant (Appendix F.2)."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.diagnostics.additive import Additive
from tokenweights.distributed import agreed
from tokenweights.masked import accumulator_dtype


@dataclass(frozen=True)
class QuadrantTokens(Additive):
    """How often each token of the vocabulary stands in each quadrant.

    Attributes:
        counts: Occurrences over the whole batch.
    """

    counts: Float[Tensor, "groups vocab"]

    @property
    def share(self) -> Float[Tensor, " groups"]:
        """Share of all tokens in each quadrant; NaN without a token."""
        return self.counts.sum(1) / self.counts.sum()

    @property
    def frequency(self) -> Float[Tensor, "groups vocab"]:
        """Share of each token within its quadrant: Figure 10's size of a word; NaN if empty."""
        return self.counts / self.counts.sum(1, keepdim=True)

    @typed
    def most_frequent(self, quadrant: int, *, limit: int = 20) -> list[tuple[int, int]]:
        """The most frequent tokens of a quadrant.

        Args:
            quadrant: The quadrant.
            limit: At most this many.

        Returns:
            Pairs of token id and number of occurrences, the most frequent first; of equally
            frequent tokens the smaller id. Tokens that do not occur are left out.

        Raises:
            TokenWeightsError: If there is no such quadrant, or the limit is negative.
        """
        last = len(self.counts) - 1
        for name, value, high in (("quadrant", quadrant, last), ("limit", limit, math.inf)):
            if not 0 <= value <= high:
                raise invalid(
                    "QuadrantTokens.most_frequent", name, f"in [0, {high}]", value,
                    "Quadrants count from 0; a limit of 0 gives none.",
                )  # fmt: skip
        counts, ids = self.counts[quadrant].sort(descending=True, stable=True)
        pairs = zip(ids[:limit].tolist(), counts[:limit].tolist(), strict=True)
        return [(token, int(count)) for token, count in pairs if count > 0]


@agreed
@typed
def quadrant_tokens(
    token_ids: Int[Tensor, "batch token"],
    quadrants: Int[Tensor, "batch token"],
    *,
    vocab_size: int,
    quadrant_count: int = 4,
    group: dist.ProcessGroup | None = None,
) -> QuadrantTokens:
    """Token frequencies in each quadrant of two scores: Figure 10, mergeable.

    Quadrants come from `median_quadrants` (Eq. 22). Any other labels from 0 will do, such as
    `quantile_bins` with `quadrant_count=10`. Memory is one number for each quadrant and vocabulary
    entry, and the merge over ranks is one reduction of as many.

    Args:
        token_ids: Vocabulary index of each token; ignored where the quadrant is -1.
        quadrants: Quadrant of each token, -1 off the mask.
        vocab_size: Size of the vocabulary, the same on every rank.
        quadrant_count: Number of quadrants.
        group: The ranks that share the batch.

    Returns:
        Counts over the whole batch, the same on every rank.

    Raises:
        TokenWeightsError: If a quadrant or a token id is out of range, or a size below 1.

    Example:
        >>> token_ids = torch.tensor([[7, 5, 7, 7]])
        >>> quadrants = torch.tensor([[0, 0, 0, -1]])
        >>> quadrant_tokens(token_ids, quadrants, vocab_size=10).most_frequent(0)
        [(7, 2), (5, 1)]
    """
    for name, size in (("vocab_size", vocab_size), ("quadrant_count", quadrant_count)):
        if size < 1:
            raise invalid("quadrant_tokens", name, ">= 1", size, "Count what there is.")
    _require_range("quadrants", quadrants, -1, quadrant_count)
    inside = quadrants >= 0
    ids = token_ids[inside].long()
    _require_range("token_ids", ids, 0, vocab_size)
    places = quadrants[inside].long() * vocab_size + ids
    counts = torch.bincount(places, minlength=quadrant_count * vocab_size)
    counts = counts.view(quadrant_count, vocab_size).to(accumulator_dtype(token_ids.device))
    return QuadrantTokens(counts).over_ranks(group)


def _require_range(argument: str, values: Tensor, low: int, high: int) -> None:
    outside = values[(values < low) | (values >= high)]
    if outside.numel():
        raise invalid(
            "quadrant_tokens",
            argument,
            f"in [{low}, {high - 1}]",
            int(outside[0]),
            "Raise `quadrant_count`." if argument == "quadrants" else "Raise `vocab_size`.",
        )
