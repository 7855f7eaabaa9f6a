"""How much each token counts: endpoint weights, subset weights, and what a set of weights does."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.distributed import agreed, global_extrema, global_sum
from tokenweights.masked import (
    accumulator_dtype,
    batch_total,
    masked_extrema,
    masked_sum,
    require_finite,
    require_weights,
    row_chunks,
    sum_dtype,
)
from tokenweights.partition import MAX_BINS, quantile_bins
from tokenweights.schedules import Endpoints


@dataclass(frozen=True)
class ScoreExtrema:
    """Smallest and largest score over the valid tokens of a rollout batch.

    Attributes:
        minimum: `inf` if there is no valid token.
        maximum: `-inf` if there is no valid token.
    """

    minimum: Float[Tensor, ""]
    maximum: Float[Tensor, ""]


@agreed
@typed
def score_extrema(
    scores: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    group: dist.ProcessGroup | None = None,
) -> ScoreExtrema:
    """Extrema of the scores over all valid tokens of the rollout batch, in the scores' unit.

    Eq. 27 rescales over the whole rollout batch. Its extrema are all that a token's weight depends
    on beyond its own score, so this one reduction of both makes weights exact on any layout.

    Args:
        scores: This rank's scores, finite under the mask.
        mask: True for valid response tokens.
        group: The ranks that share the rollout batch; None if these tokens are all there is.

    Returns:
        The same float64 extrema on every rank.

    Raises:
        TokenWeightsError: If a valid score is not finite.

    Example:
        >>> extrema = score_extrema(torch.tensor([[0.25, 0.75]]), torch.ones(1, 2).bool())
        >>> extrema.minimum.item(), extrema.maximum.item()
        (0.25, 0.75)
    """
    return _score_extrema("score_extrema", scores, mask, group)


def _score_extrema(
    function: str, scores: Tensor, mask: Tensor, group: dist.ProcessGroup | None
) -> ScoreExtrema:
    require_finite(function, "scores", scores, mask)
    low, high = masked_extrema(scores.detach(), mask)
    # One dtype whatever the scores' own, so that a rank without rows cannot disagree on it.
    dtype = accumulator_dtype(scores.device)
    return ScoreExtrema(*global_extrema(low.to(dtype), high.to(dtype), group=group))


@agreed
@typed
def softmax_partition(
    scores: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    extrema: ScoreExtrema,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    r"""The sum in the denominator of Eq. 26, over all valid tokens of the rollout batch.

    $Z = \sum_u \exp((H_u - H_{\max}) / \tau)$, in [1, tokens]. Only the literal form needs it.

    Args:
        scores: This rank's scores.
        mask: True for valid response tokens.
        extrema: Extrema over the same rollout batch.
        temperature: $\tau > 0$, in the scores' unit.
        group: The ranks that share the rollout batch.

    Returns:
        A detached scalar, the same on every rank.

    Raises:
        TokenWeightsError: If `temperature` is not positive or a valid score is not finite.

    Example:
        >>> scores, mask = torch.tensor([[0.5, 0.5]]), torch.ones(1, 2, dtype=torch.bool)
        >>> softmax_partition(scores, mask, score_extrema(scores, mask))
        tensor(2., dtype=torch.float64)
    """
    _require_temperature("softmax_partition", temperature)
    require_finite("softmax_partition", "scores", scores, mask)
    total = torch.zeros((), dtype=accumulator_dtype(scores.device), device=scores.device)
    for rows in row_chunks(scores.shape):
        wide = scores[rows].detach().to(total.dtype)
        total += masked_sum(((wide - extrema.maximum) / temperature).exp(), mask[rows])
    return global_sum(total, group=group)


@agreed
@typed
def endpoint_weights(
    scores: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    endpoints: Endpoints,
    *,
    temperature: float = 1.0,
    extrema: ScoreExtrema | None = None,
    form: Literal["stable", "literal"] = "stable",
    eps: float = 1e-8,
    partition: Float[Tensor, ""] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "batch token"]:
    r"""Weights that run from one endpoint at the lowest score to the other at the highest.

    Eq. 28: $w_t = (1 - \bar\alpha_t) w_{low} + \bar\alpha_t w_{high}$, where $\bar\alpha$ is the
    softmax of the scores rescaled to [0, 1] over the rollout batch (Eq. 26, 27). The softmax's
    normalizer cancels, so the stable form computes
    $\bar\alpha_t = \mathrm{expm1}((H_t - H_{\min})/\tau) / \mathrm{expm1}((H_{\max} -
    H_{\min})/\tau)$ without overflow at any temperature. A small $\tau$ raises only the top scores;
    a large one gives plain min-max scaling. If all scores are equal, $\bar\alpha = 0$.

    The literal form keeps Eq. 26 and 27 as printed. Its `eps` makes weights depend on the number
    of tokens: with scores in 0.2..0.9 and $\tau = 1$ the largest $\bar\alpha$ is 0.99 for $10^6$
    tokens and 0.88 for $10^7$.

    Weights are float32, detached and in [min(low, high), max(low, high)]; they multiply advantages.

    Args:
        scores: One score for each response token, finite under the mask.
        mask: True for valid response tokens.
        endpoints: Weights at the lowest and at the highest score.
        temperature: $\tau > 0$, in the scores' unit. The paper's text does not give its value.
        extrema: Extrema over the rollout batch; taken from these scores, over `group`, if None.
            Pass them whenever `scores` is only a part of the batch.
        form: `"stable"` or `"literal"`.
        eps: The literal form's epsilon.
        partition: The literal form's `softmax_partition`; taken from these scores if None.
        group: The ranks that share the rollout batch.

    Returns:
        Weights, 0 off the mask.

    Raises:
        TokenWeightsError: If `temperature` or `eps` is not positive, `partition` is negative or not
            finite, or a valid score is not finite or lies outside `extrema`.

    Example:
        >>> scores, mask = torch.tensor([[0.0, 0.5, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
        >>> endpoint_weights(scores, mask, Endpoints(low=0.0, high=1.0))
        tensor([[0.0000, 0.3775, 1.0000]])
    """
    _require_temperature("endpoint_weights", temperature)
    if not 0 < eps < math.inf:
        raise invalid("endpoint_weights", "eps", "positive and finite", eps, "Try 1e-8.")
    if form == "stable":
        partition = None
    own = _score_extrema("endpoint_weights", scores, mask, group if extrema is None else None)
    if extrema is None:
        extrema = own
    elif _enclose(extrema, own):
        dtype = own.minimum.dtype
        ends = (end.detach().to(dtype) for end in (extrema.minimum, extrema.maximum))
        extrema = ScoreExtrema(*ends)
    else:
        raise invalid(
            "endpoint_weights",
            "extrema",
            f"that enclose the scores {own.minimum.item():g}..{own.maximum.item():g}",
            f"{extrema.minimum.item():g}..{extrema.maximum.item():g}",
            "Take them over the whole rollout batch with `score_extrema`.",
        )
    if form == "literal" and partition is None:
        partition = softmax_partition(scores, mask, extrema, temperature=temperature, group=group)
    elif partition is not None:
        partition = batch_total("endpoint_weights", "partition", partition, scores.device)
    weights = torch.zeros(scores.shape, dtype=torch.float32, device=scores.device)
    bounds = sorted((endpoints.low, endpoints.high))
    for rows in row_chunks(scores.shape):
        wide = scores[rows].detach().to(extrema.minimum.dtype)
        # Extrema of a narrower dtype than the scores' may lie a rounding error inside.
        wide = wide.clamp(extrema.minimum, extrema.maximum)
        wide = torch.where(mask[rows], wide, extrema.minimum)
        alpha = _rescaled_softmax(wide, extrema, temperature, eps, partition)
        # As printed: a difference of endpoints would lose the smaller one beside the larger.
        part = ((1 - alpha) * endpoints.low + alpha * endpoints.high).clamp(*bounds)
        weights[rows] = torch.where(mask[rows], part, 0.0).float()
    return weights


def _rescaled_softmax(
    scores: Tensor, extrema: ScoreExtrema, temperature: float, eps: float, partition: Tensor | None
) -> Tensor:
    """The softmax of Eq. 26 rescaled by Eq. 27; literally so if a partition is given."""
    below_top = (scores - extrema.maximum) / temperature
    bottom = (extrema.minimum - extrema.maximum) / temperature
    if partition is None:
        # expm1(x) / expm1(X) = exp(x - X) expm1(-x) / expm1(-X), and x - X <= 0 cannot overflow.
        above_bottom = torch.expm1((extrema.minimum - scores) / temperature)
        alpha = below_top.exp() * above_bottom / torch.expm1(bottom)
        return torch.where(bottom < 0, alpha, 0.0)
    numerator = (below_top.exp() - bottom.exp()) / (partition + eps)
    return numerator / ((1 - bottom.exp()) / (partition + eps) + eps)


@typed
def subset_weights(subset: Bool[Tensor, "batch token"]) -> Float[Tensor, "batch token"]:
    """Hard weights: 1 for the chosen tokens, 0 for all others (Appendix D.3).

    Args:
        subset: True for the chosen tokens.

    Returns:
        Float32 weights.

    Example:
        >>> subset_weights(torch.tensor([[True, False]]))
        tensor([[1., 0.]])
    """
    return subset.float()


@agreed
@typed
def match_mass(
    weights: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    target: float = 1.0,
    count: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
    mass: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "batch token"]:
    r"""Weights rescaled so that their mean over the batch's valid tokens is `target`.

    A schedule like Low2High moves the mean weight, and so the effective learning rate; the rescaled
    weights keep only the *order* it gives to tokens. $w'_t = w_t \cdot$ target $\cdot N / \sum w$.

    Args:
        weights: Weights >= 0.
        mask: True for valid response tokens.
        target: Mean of the result over the whole batch.
        count: Number of valid tokens of the whole batch; these tokens', over `group`, if None.
        mass: Sum of the weights over the whole batch; these tokens', over `group`, if None.
        group: The ranks that share the batch.

    Returns:
        Rescaled weights, detached, 0 off the mask, of the dtype of `weights`, but float32 for half
        precision, which a single weight among many tokens would overflow. If all weights are 0 they
        stay 0.

    Raises:
        TokenWeightsError: If a valid weight, `target`, `count` or `mass` is negative or not finite.

    Example:
        >>> match_mass(torch.tensor([[0.0, 0.5]]), torch.ones(1, 2, dtype=torch.bool))
        tensor([[0., 2.]])
    """
    require_weights("match_mass", weights, mask)
    mean = batch_total("match_mass", "target", target, weights.device)
    count, mass = (
        None if value is None else batch_total("match_mass", name, value, weights.device)
        for name, value in (("count", count), ("mass", mass))
    )
    # Every rank enters the reduction or none does: it depends on arguments, not on tokens.
    if count is None or mass is None:
        dtype = accumulator_dtype(weights.device)
        own = [mask.sum().to(dtype), masked_sum(weights.to(dtype), mask)]
        totals = global_sum(torch.stack(own), group=group)
        count = totals[0] if count is None else count
        mass = totals[1] if mass is None else mass
    matched = torch.zeros(weights.shape, dtype=sum_dtype(weights.dtype), device=weights.device)
    for rows in row_chunks(mask.shape):
        # The share of the mass first: it is at most 1 however small the weights are.
        wide = torch.where(mask[rows], weights[rows].detach(), 0.0).to(mass.dtype)
        share = wide / mass.where(mass > 0, 1)
        matched[rows] = (share * (mean * count)).to(matched.dtype)
    return matched


@dataclass(frozen=True)
class WeightStatistics:
    r"""What a set of token weights does to a batch.

    Attributes:
        mean: Mean weight over valid tokens: the factor on the effective learning rate.
        effective_sample_size: $(\sum w)^2 / \sum w^2$ as a share of the valid tokens.
        share: Share of the total weight on the tokens of each bin; sums to one.
    """

    mean: Float[Tensor, ""]
    effective_sample_size: Float[Tensor, ""]
    share: Float[Tensor, " bins"]


@agreed
@typed
def weight_statistics(
    weights: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    bins: Int[Tensor, "batch token"] | None = None,
    bin_count: int = 10,
    group: dist.ProcessGroup | None = None,
) -> WeightStatistics:
    """Mean, effective sample size and share of mass per bin of a set of weights, dimensionless.

    Args:
        weights: Weights >= 0.
        mask: True for valid response tokens.
        bins: Bin of each token, for example `quantile_bins` of the scores; deciles of the weights
            themselves within each response if None.
        bin_count: Number of bins.
        group: The ranks that share the batch.

    Returns:
        Statistics over the whole batch, detached; all 0 if there is no valid token or no weight.

    Raises:
        TokenWeightsError: If a valid weight is negative or not finite, `bin_count` is out of range,
            or a bin is.

    Example:
        >>> mask = torch.ones(1, 4, dtype=torch.bool)
        >>> weight_statistics(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), mask).effective_sample_size
        tensor(0.5000)
    """
    if not 1 <= bin_count <= MAX_BINS:
        condition = f"in [1, {MAX_BINS}]"
        raise invalid("weight_statistics", "bin_count", condition, bin_count, "Pass 10.")
    require_weights("weight_statistics", weights, mask)
    if bins is None:
        bins = quantile_bins(weights, mask, bins=bin_count)
    if bool((mask & ((bins < 0) | (bins >= bin_count))).any()):
        raise invalid(
            "weight_statistics", "bins", f"in [0, {bin_count}) under the mask", "others",
            "Set `bin_count` to the number of bins.",
        )  # fmt: skip
    dtype = accumulator_dtype(weights.device)
    # In units of the largest weight, the square of which neither overflows nor underflows.
    low, high = (value.detach().to(dtype) for value in masked_extrema(weights, mask))
    unit = global_extrema(low, high, group=group)[1].clamp(min=0)
    own = unit.new_zeros(2 + bin_count)  # valid tokens, squares, mass of each bin
    for rows in row_chunks(mask.shape):
        valid = mask[rows]
        wide = weights[rows][valid].detach().to(dtype) / unit.where(unit > 0, 1)
        own[0] += valid.sum()
        own[1] += wide.square().sum()
        own[2:].index_add_(0, bins[rows][valid].long(), wide)
    count, squares, *mass = global_sum(own, group=group)
    total = torch.stack(mass).sum()
    effective = total.square() / squares.where(squares > 0, 1) / count.clamp(min=1)
    return WeightStatistics(
        mean=(total / count.clamp(min=1) * unit).float(),
        effective_sample_size=effective.float(),
        share=(torch.stack(mass) / total.where(total > 0, 1)).float(),
    )


def _require_temperature(function: str, temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise invalid(function, "temperature", "positive and finite", temperature, "Try 1.0.")


def _enclose(outer: ScoreExtrema, inner: ScoreExtrema) -> bool:
    """Whether no score lies outside, at the precision of the outer extrema; true when compiling."""
    if torch.compiler.is_compiling():
        return True
    dtype = outer.minimum.dtype
    low, high = inner.minimum.to(dtype), inner.maximum.to(dtype)
    return bool((low >= outer.minimum) & (high <= outer.maximum))
