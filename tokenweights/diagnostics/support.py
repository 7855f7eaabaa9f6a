"""How concentrated the attention behind groups of tokens is (Section 4, Appendix H.1 and H.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid, refused_by
from tokenweights._typing import typed
from tokenweights.attention import AttentionStatistics, EntropyKind
from tokenweights.attention.statistics import ENTROPY_KINDS
from tokenweights.diagnostics.additive import Additive
from tokenweights.diagnostics.dynamics import require_finite_heads, token_sum
from tokenweights.distributed import agreed
from tokenweights.masked import accumulator_dtype, require_finite
from tokenweights.partition import bottom_fraction, top_fraction
from tokenweights.signals import align_to_decision, align_to_own

SPANS = ("mean_distance", "local_mass", "nonlocal_mass")


@dataclass(frozen=True)
class SupportConcentration(Additive):
    """Sums over groups of tokens, whose means tell sparse from diffuse support.

    Statistics with a head axis give every field but `count` one, after the groups.

    Attributes:
        count: Tokens of each group.
        support_total: Sum of the support sizes, for each mass; None where not measured.
        distance_total: Sum of the mean distances; None where not measured.
        local_total: Sum of the local masses; None where not measured.
        nonlocal_total: Sum of the non-local masses; None where not measured.
    """

    count: Float[Tensor, " groups"]
    support_total: Float[Tensor, "groups *heads mass"] | None = None
    distance_total: Float[Tensor, "groups *heads"] | None = None
    local_total: Float[Tensor, "groups *heads"] | None = None
    nonlocal_total: Float[Tensor, "groups *heads"] | None = None

    @property
    def support_size(self) -> Float[Tensor, "groups *heads mass"] | None:
        """Mean number of keys that hold each mass; NaN for an empty group."""
        return self._mean(self.support_total)

    @property
    def mean_distance(self) -> Float[Tensor, "groups *heads"] | None:
        """Mean distance from query to key, in real tokens; NaN for an empty group."""
        return self._mean(self.distance_total)

    @property
    def local_mass(self) -> Float[Tensor, "groups *heads"] | None:
        """Mean share of the mass inside the local window; NaN for an empty group."""
        return self._mean(self.local_total)

    @property
    def nonlocal_mass(self) -> Float[Tensor, "groups *heads"] | None:
        """Mean share of the mass outside it; NaN for an empty group."""
        return self._mean(self.nonlocal_total)

    def _mean(self, total: Tensor | None) -> Tensor | None:
        if total is None:
            return None
        return total / self.count.view(-1, *[1] * (total.dim() - 1))


@agreed
@typed
def support_concentration(
    statistics: AttentionStatistics,
    groups: Sequence[Bool[Tensor, "batch token"]],
    *,
    group: dist.ProcessGroup | None = None,
) -> SupportConcentration:
    """Support sizes, distances, local and non-local mass, averaged over each group of tokens.

    Section 4 and Figures 3 and 15 to 18: anchors need fewer keys than explorers to gather the same
    mass, while distance and locality depend on the entropy that made the groups.

    Args:
        statistics: Statistics of the response tokens, from `response_statistics`; any of
            `support_size`, `mean_distance`, `local_mass`, `nonlocal_mass`, with or without heads.
        groups: Masks of the groups, which may overlap: all tokens, anchors, explorers, random ones.
        group: The ranks that share the batch.

    Returns:
        Float64 sums over the whole batch, with the means as properties; the same on every rank.

    Raises:
        TokenWeightsError: If there is no group, nothing was measured, or shapes do not fit.

    Example:
        >>> from tokenweights import AttentionStatistics
        >>> statistics = AttentionStatistics(support_size=torch.tensor([[[1, 2], [3, 6]]]))
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> first = torch.tensor([[True, False]])
        >>> support_concentration(statistics, [mask, first]).support_size.tolist()
        [[2.0, 4.0], [1.0, 2.0]]
    """
    if not groups:
        raise invalid("support_concentration", "groups", "with a mask", "none", "Pass one.")
    spans = [_checked(statistics, name, groups) for name in SPANS]
    sizes = statistics.support_size
    if sizes is not None:
        # The mass axis goes where heads are, so that tokens come last in every field.
        _require_shape("support_size", sizes[..., 0], groups[0])
        sizes = sizes.movedim(-1, -2)
    if sizes is None and all(span is None for span in spans):
        raise invalid(
            "support_concentration",
            "statistics",
            "with `support_size`, `mean_distance`, `local_mass` or `nonlocal_mass`",
            "none of them",
            "Ask `attention_statistics` for them.",
        )
    device = groups[0].device
    dtype = accumulator_dtype(device)
    count = torch.stack([members.count_nonzero() for members in groups]).to(dtype)
    totals = [
        None
        if values is None
        else torch.stack([token_sum(values.detach().to(dtype), members) for members in groups])
        for values in (sizes, *spans)
    ]
    return SupportConcentration(count, *totals).over_ranks(group)


@agreed
@typed
def support_by_entropy(
    statistics: AttentionStatistics,
    mask: Bool[Tensor, "batch token"],
    *,
    fraction: float = 0.2,
    group: dist.ProcessGroup | None = None,
) -> Mapping[EntropyKind, SupportConcentration]:
    """Support of all tokens, of anchors and of explorers, under every entropy that was measured.

    Appendix H.1 under `normalized`, `raw`, `topk` and `fixed`. For the variant of the first 512
    response tokens pass `first_tokens(mask, count=512)` as the mask.

    Args:
        statistics: Statistics of the response tokens, from `response_statistics`, with at least
            one entropy and one statistic of support, and without a head axis.
        mask: True for valid response tokens.
        fraction: Share of each response that makes up anchors, and explorers, in [0, 1].
        group: The ranks that share the batch.

    Returns:
        For each entropy kind the groups all, anchors and explorers, in this order.

    Raises:
        TokenWeightsError: If there is no entropy, a valid one is not finite, or `fraction` is
            outside [0, 1]; or as in `support_concentration`.

    Example:
        >>> from tokenweights import attention_statistics
        >>> statistics = attention_statistics(torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8))
        >>> mask = torch.ones(1, 9, dtype=torch.bool)
        >>> support = support_by_entropy(statistics, mask)
        >>> sorted(support), support["raw"].support_size.shape
        (['fixed', 'normalized', 'raw', 'topk'], torch.Size([3, 4]))
    """
    groups = {}
    for kind in ENTROPY_KINDS:
        scores = getattr(statistics, kind)
        if scores is not None:
            _require_shape(kind, scores, mask, heads=False)
            require_finite("support_by_entropy", f"statistics.{kind}", scores, mask)
            with refused_by("support_by_entropy"):
                anchors = bottom_fraction(scores, mask, fraction=fraction)
                explorers = top_fraction(scores, mask, fraction=fraction)
            groups[kind] = [mask, anchors, explorers]
    if not groups:
        raise invalid(
            "support_by_entropy", "statistics", "with an entropy", "none",
            "Ask `attention_statistics` for one.",
        )  # fmt: skip
    # After all checks: ranks that have begun to merge wait for each other.
    with refused_by("support_by_entropy"):
        return {
            kind: support_concentration(statistics, members, group=group)
            for kind, members in groups.items()
        }


@typed
def response_statistics(
    statistics: AttentionStatistics,
    *,
    response_length: int,
    prompt_length: Int[Tensor, " batch"] | None = None,
    alignment: Literal["deciding", "own"] = "deciding",
) -> AttentionStatistics:
    """Statistics of sequence positions as statistics of response tokens, field by field.

    Args:
        statistics: Statistics of every position of the sequences, or of the last ones; with or
            without heads.
        response_length: As in `align_to_decision`.
        prompt_length: As in `align_to_decision`.
        alignment: Whose row stands for a token: the one `"deciding"` it, or its `"own"`.

    Returns:
        A record whose queries are response tokens. Beyond the last column it repeats values that
        no mask holds.

    Raises:
        TokenWeightsError: As `align_to_decision`, or if nothing was measured.

    Example:
        >>> from tokenweights import AttentionStatistics
        >>> statistics = AttentionStatistics(raw=torch.tensor([[0.0, 0.1, 0.2, 0.3]]))
        >>> response_statistics(statistics, response_length=2).raw
        tensor([[0.1000, 0.2000]])
    """
    given = {field.name: getattr(statistics, field.name) for field in fields(statistics)}
    given = {name: values for name, values in given.items() if values is not None}
    if not given:
        raise invalid(
            "response_statistics", "statistics", "with a field", "none", "Measure something first."
        )
    name, values = next(iter(given.items()))
    batch, width = len(values), values.shape[-2 if name == "support_size" else -1]
    align = align_to_decision if alignment == "deciding" else align_to_own
    places = torch.arange(width, device=values.device, dtype=torch.float32).expand(batch, width)
    with refused_by("response_statistics"):
        columns = align(places, response_length=response_length, prompt_length=prompt_length).long()

    def taken(name: str, values: Tensor) -> Tensor:
        dim = values.dim() - (2 if name == "support_size" else 1)
        shape = [1] * values.dim()
        shape[0], shape[dim] = columns.shape
        wanted = list(values.shape)
        wanted[dim] = response_length
        return values.gather(dim, columns.view(shape).expand(wanted))

    return AttentionStatistics(**{name: taken(name, values) for name, values in given.items()})


def _checked(statistics: AttentionStatistics, name: str, groups: Sequence[Tensor]) -> Tensor | None:
    values = getattr(statistics, name)
    if values is not None:
        _require_shape(name, values, groups[0])
        for members in groups:
            require_finite_heads("support_concentration", f"statistics.{name}", values, members)
    return values


def _require_shape(name: str, values: Tensor, mask: Tensor, *, heads: bool = True) -> None:
    shape = (values.shape[0], values.shape[-1])
    if shape != tuple(mask.shape) or (not heads and values.dim() != 2):
        raise invalid(
            "support_concentration" if heads else "support_by_entropy",
            f"statistics.{name}",
            f"of {mask.shape[0]} responses and {mask.shape[1]} tokens"
            + ("" if heads else ", without heads"),
            f"shape {tuple(values.shape)}",
            "Align the statistics with `response_statistics`.",
        )
