"""Scores on a common scale: moments over responses, prompts or the rollout batch; bounded maps.

Three scales share their sets. `scope` says which responses a statistic spans: each alone, all to
one prompt, or the rollout batch over all ranks of `group`. `sign` narrows it to the tokens whose
advantage is positive or negative. Tokens of the other sign are mapped by the same statistics.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.distributed import agreed, global_sum
from tokenweights.masked import accumulator_dtype, require_finite, row_chunks, sum_dtype
from tokenweights.scopes import Scope, Segments, Sign, candidates, segments

Per = Literal["token", "response"]

# Two means that differ by so many machine epsilons of the largest score are the same but for
# rounding, that of the scores and that of the sum.
TIED_EPSILONS = 8
SHARE_BITS = 30


@agreed
@typed
def mean_one(
    scores: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    scope: Scope = "batch",
    prompt_ids: Int[Tensor, " batch"] | None = None,
    advantages: Float[Tensor, "batch #token"] | None = None,
    sign: Sign = "any",
    per: Per = "token",
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "batch token"]:
    r"""Scores over their mean within the scope, `batch token`, dimensionless.

    $y_t = x_t / \bar x$, >= 0 and of mean 1. Where the mean is 0, and in a set without a token of
    the sign, every $y_t$ is 1. Sums are taken in float64 of scores over the largest, so no size of
    score overflows.

    Args:
        scores: Scores >= 0, finite under the mask.
        mask: True for valid response tokens.
        scope: The responses a mean spans: `"response"`, `"prompt"` or `"batch"`.
        prompt_ids: For the scope `"prompt"`: a number for each response, equal for responses to
            one prompt, alike on all ranks.
        advantages: For a sign other than `"any"`: one for each token, or one for each response.
        sign: The mean is that of tokens whose advantage has this sign. Others are divided by the
            same mean.
        per: `"token"`: every token counts once. `"response"`: every response with a token of the
            sign counts once, with the mean over those tokens, whatever its length. These means do
            not depend on the order of tokens or on padding.
        group: The ranks that share the batch.

    Returns:
        Detached float32, float64 for float64 scores; 0 off the mask.

    Raises:
        TokenWeightsError: If a valid score is negative or not finite, or `prompt_ids` or
            `advantages` are needed and missing, or a valid advantage is not finite.

    Example:
        >>> mask = torch.tensor([[True, True, False]])
        >>> mean_one(torch.tensor([[1.0, 3.0, 9.0]]), mask)
        tensor([[0.5000, 1.5000, 0.0000]])
    """
    _require_non_negative(scores, mask)
    sample = _sample("mean_one", scores, mask, scope, prompt_ids, advantages, sign, per, group)
    high = sample.extrema()[1]
    low = torch.zeros_like(high)
    mean = sample.moments(low, high)[0]

    def scaled(wide: Tensor, rows: slice) -> Tensor:
        quotient = _rescaled(wide, low[rows], high[rows]) / mean[rows]
        return torch.where(high[rows] > 0, quotient, 1.0)

    return _mapped(scores, mask, scaled)


@agreed
@typed
def z_scores(
    scores: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    scope: Scope = "batch",
    prompt_ids: Int[Tensor, " batch"] | None = None,
    advantages: Float[Tensor, "batch #token"] | None = None,
    sign: Sign = "any",
    per: Per = "token",
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "batch token"]:
    r"""Scores in population standard deviations from their mean within the scope, `batch token`.

    $y_t = (x_t - \bar x) / \sqrt{\overline{(x - \bar x)^2}}$, within $\pm\sqrt{n - 1}$ for the $n$
    tokens that the moments are taken of. A set of equal scores, of one score or of none gives
    exactly 0, and so does one of responses whose means tie, see `per`. Moments are taken in float64
    of scores that are first rescaled to [0, 1], so neither a large common offset nor the size of
    the scores costs digits.

    Args:
        scores: Any scores, finite under the mask.
        mask: True for valid response tokens.
        scope: The responses that moments span, as in `mean_one`.
        prompt_ids: As in `mean_one`.
        advantages: As in `mean_one`.
        sign: Moments are those of tokens whose advantage has this sign. Others are mapped by the
            same moments and may lie further out.
        per: `"token"`, or `"response"` for moments in which every response counts once, as in
            `mean_one`: the scale for a score that is constant over each response. Means that all
            lie within 8 machine epsilons of the set's largest absolute score, of the scores' dtype
            but at least float32, tie: they differ by rounding only.
        group: The ranks that share the batch.

    Returns:
        Detached float32, float64 for float64 scores; 0 off the mask.

    Raises:
        TokenWeightsError: If a valid score is not finite, or `prompt_ids` or `advantages` are
            needed and missing, or a valid advantage is not finite.

    Example:
        >>> mask = torch.ones(1, 4, dtype=torch.bool)
        >>> z_scores(torch.tensor([[1.0, 1.0, 3.0, 3.0]]), mask)
        tensor([[-1., -1.,  1.,  1.]])
    """
    sample = _sample("z_scores", scores, mask, scope, prompt_ids, advantages, sign, per, group)
    low, high = sample.distinct_extrema()
    mean, deviation = sample.moments(low, high)

    def scaled(wide: Tensor, rows: slice) -> Tensor:
        apart = _rescaled(wide, low[rows], high[rows]) - mean[rows]
        return torch.where(high[rows] > low[rows], apart / deviation[rows], 0.0)

    return _mapped(scores, mask, scaled)


@agreed
@typed
def min_max(
    scores: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    scope: Scope = "batch",
    prompt_ids: Int[Tensor, " batch"] | None = None,
    advantages: Float[Tensor, "batch #token"] | None = None,
    sign: Sign = "any",
    per: Per = "token",
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "batch token"]:
    r"""Scores rescaled by their extrema within the scope, `batch token`, in [0, 1].

    $y_t = (x_t - \min x) / (\max x - \min x)$. A set of equal scores, of one score or of none gives
    0.5: nothing tells its tokens apart, so none is the lowest or the highest.

    Args:
        scores: Any scores, finite under the mask.
        mask: True for valid response tokens.
        scope: The responses that extrema span, as in `mean_one`.
        prompt_ids: As in `mean_one`.
        advantages: As in `mean_one`.
        sign: Extrema are those of tokens whose advantage has this sign. Others are mapped by the
            same extrema and may leave [0, 1].
        per: `"token"`, or `"response"` for extrema of the responses' means, as in `mean_one`;
            single tokens may then leave [0, 1]. Means that tie, as in `z_scores`, are equal scores.
        group: The ranks that share the batch.

    Returns:
        Detached float32, float64 for float64 scores; 0 off the mask.

    Raises:
        TokenWeightsError: If a valid score is not finite, or `prompt_ids` or `advantages` are
            needed and missing, or a valid advantage is not finite.

    Example:
        >>> scores, mask = torch.tensor([[2.0, 4.0, 3.0], [7.0, 7.0, 7.0]]), torch.ones(2, 3).bool()
        >>> min_max(scores, mask, scope="response")
        tensor([[0.0000, 1.0000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """
    sample = _sample("min_max", scores, mask, scope, prompt_ids, advantages, sign, per, group)
    low, high = sample.distinct_extrema()

    def scaled(wide: Tensor, rows: slice) -> Tensor:
        unit = _rescaled(wide, low[rows], high[rows])
        return torch.where(high[rows] > low[rows], unit, 0.5)

    return _mapped(scores, mask, scaled)


@typed
def bounded_map(
    values: Float[Tensor, "batch token"],
    *,
    shape: Literal["linear", "exponential", "sigmoid"] = "linear",
    slope: float = 1.0,
    offset: float = 0.0,
    scale: float = 1.0,
    low: float = 0.0,
    high: float | None = None,
) -> Float[Tensor, "batch token"]:
    r"""A monotone function of each value, clipped to bounds, `batch token`: from scores to weights.

    $y = \mathrm{clip}(c\, f(a x + b),\ \mathrm{low},\ \mathrm{high})$ with slope $a$, offset $b$,
    scale $c$, and

    - linear: $f(z) = z$;
    - exponential: $f(z) = e^z$;
    - sigmoid: $f(z) = 1 / (1 + e^{-z})$.

    In [low, high], and finite also without an upper bound: what overflows becomes the largest
    float. NaN stays NaN.

    Args:
        values: One for each response token, for example `z_scores`.
        shape: `"linear"`, `"exponential"` or `"sigmoid"`.
        slope: $a$; negative for a falling function.
        offset: $b$.
        scale: $c$.
        low: Lower bound; `-math.inf` for none.
        high: Upper bound; None for none.

    Returns:
        Detached float32, float64 for float64 values.

    Raises:
        TokenWeightsError: If `slope`, `offset` or `scale` is not finite, or not `low` <= `high`.

    Example:
        >>> values = torch.tensor([[-3.0, 0.0, 1.0]])
        >>> bounded_map(values, slope=0.5, offset=1.0, high=1.25)
        tensor([[0.0000, 1.0000, 1.2500]])
        >>> bounded_map(values, shape="sigmoid", scale=2.0)
        tensor([[0.0949, 1.0000, 1.4621]])
    """
    for name, number in (("slope", slope), ("offset", offset), ("scale", scale)):
        if not math.isfinite(number):
            raise invalid("bounded_map", name, "finite", number, "Pass 1.0 to leave values alone.")
    top = math.inf if high is None else high
    if not low <= top:
        condition, hint = "with low <= high", "They bound the result from below and from above."
        raise invalid("bounded_map", "low, high", condition, (low, high), hint)
    mapped = torch.empty(values.shape, dtype=sum_dtype(values.dtype), device=values.device)
    dtype = accumulator_dtype(values.device)
    largest = torch.finfo(dtype).max
    narrow = torch.finfo(mapped.dtype).max
    for rows in row_chunks(values.shape):
        # Clamped to finite floats at each step: 0 * inf would be NaN.
        wide = values[rows].detach().to(dtype).clamp(-largest, largest)
        line = (slope * wide + offset).clamp(-largest, largest)
        if shape == "exponential":
            line = line.exp().clamp(max=largest)
        elif shape == "sigmoid":
            line = line.sigmoid()
        mapped[rows] = (scale * line).clamp(low, top).clamp(-narrow, narrow).to(mapped.dtype)
    return mapped


@dataclass(frozen=True)
class _Sample:
    """Scores that statistics are taken of, `batch token`, and the set that each row belongs to."""

    scores: Tensor
    valid: Tensor
    sets: Segments
    rounding: Tensor | None = None  # of means, `batch 1`: no further apart they tie

    def extrema(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest score of each row's set, `batch 1`; `(inf, -inf)` without one."""
        low, negated_high = self._least_of(self._negated_extrema())
        return low, -negated_high

    def distinct_extrema(self) -> tuple[Tensor, Tensor]:
        """As `extrema`, but the same number twice where means tie."""
        if self.rounding is None:
            return self.extrema()
        lines = [*self._negated_extrema(), -self.rounding[:, 0]]
        low, negated_high, negated_rounding = self._least_of(torch.stack(lines))
        high = -negated_high
        return low, torch.where(high - low <= -negated_rounding, low.minimum(high), high)

    def _negated_extrema(self) -> Tensor:
        """Smallest and negated largest score of each row, `2 batch`."""
        dtype = accumulator_dtype(self.scores.device)
        negated = torch.full(
            (2, len(self.scores)), torch.inf, dtype=dtype, device=self.valid.device
        )
        if self.scores.shape[1]:
            for rows in row_chunks(self.scores.shape):
                wide, valid = self.scores[rows].to(dtype), self.valid[rows]
                negated[0, rows] = torch.where(valid, wide, torch.inf).amin(-1)
                negated[1, rows] = torch.where(valid, -wide, torch.inf).amin(-1)
        return negated

    def _least_of(self, lines: Tensor) -> Tensor:
        """The least of each line, `lines batch`, over each row's set, `lines batch 1`."""
        own = lines.new_full((len(lines), self._count), torch.inf)
        own.scatter_reduce_(1, self.sets.rows.expand(len(lines), -1), lines, "amin")
        return self._of_rows(_least(own, self.sets.group))

    def moments(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and population deviation of each row's set, rescaled by `low` and `high`, `batch 1`.

        The sum of squares loses no digits to the mean: where one of $n$ scores in [0, 1] is 0, the
        variance is at least the $n$-th part of the squared mean.
        """
        own = low.new_zeros(3, self._count)  # scores, their sum, the sum of their squares
        for rows in row_chunks(self.scores.shape):
            unit = _rescaled(self.scores[rows].to(low.dtype), low[rows], high[rows])
            unit = torch.where(self.valid[rows], unit, 0.0)
            count = self.valid[rows].sum(-1).to(low.dtype)
            sums = torch.stack([count, unit.sum(-1), unit.square().sum(-1)])
            own.index_add_(1, self.sets.rows[rows], sums)
        count, total, squares = self._of_rows(global_sum(own, group=self.sets.group))
        mean = total / count.clamp(min=1)
        variance = squares / count.clamp(min=1) - mean.square()
        return mean, variance.clamp(min=0).sqrt()

    def response_means(self) -> "_Sample":
        """A sample of one score for each response that has any: the mean of its scores.

        The same on any layout: the shares of a response's spread add up as integers.
        """
        low, negated_high = self._negated_extrema()[..., None]
        high, share = -negated_high, torch.zeros_like(low)
        for rows in row_chunks(self.scores.shape):
            unit = _rescaled(self.scores[rows].to(low.dtype), low[rows], high[rows])
            unit = torch.where(self.valid[rows], unit, 0.0) * 2**SHARE_BITS
            digits = unit.floor(), ((unit - unit.floor()) * 2**SHARE_BITS).round()
            first, second = (each.long().sum(-1).to(low.dtype) for each in digits)
            total = (first + second / 2**SHARE_BITS) / 2**SHARE_BITS
            share[rows, 0] = total / self.valid[rows].sum(-1).clamp(min=1)
        valid = self.valid.any(-1, keepdim=True)
        epsilon = torch.finfo(sum_dtype(self.scores.dtype)).eps
        rounding = low.abs().maximum(high.abs()) * (TIED_EPSILONS * epsilon)
        # Exact where all scores of a response are equal: then the share is 0.
        means = low * (1 - share) + high * share
        return _Sample(means, valid, self.sets, torch.where(valid, rounding, 0.0))

    @property
    def _count(self) -> int:
        return max(self.sets.count, 1)  # rows without a token have a number too

    def _of_rows(self, sets: Tensor) -> Tensor:
        return sets[:, self.sets.rows, None]


def _sample(
    function: str,
    scores: Tensor,
    mask: Tensor,
    scope: Scope,
    prompt_ids: Tensor | None,
    advantages: Tensor | None,
    sign: Sign,
    per: Per,
    group: dist.ProcessGroup | None,
) -> _Sample:
    # All that a rank may refuse comes before the sets, which communicate.
    require_finite(function, "scores", scores, mask)
    chosen = candidates(function, mask, advantages=advantages, sign=sign)
    sets = segments(function, mask, scope=scope, prompt_ids=prompt_ids, group=group)
    sample = _Sample(scores.detach(), chosen, sets)
    return sample.response_means() if per == "response" else sample


def _least(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Elementwise minimum over ranks, each of which fills a line of one table that is summed."""
    if group is None:
        return own
    table = own.new_zeros(group.size(), *own.shape)
    table[group.rank()] = own
    return global_sum(table, group=group).amin(0)


def _rescaled(wide: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(x - low) / (high - low), also where a difference overflows; any number if low >= high."""
    half = 1 - 0.5 * (high - low).isinf().to(wide.dtype)
    width = half * high - half * low
    return (half * wide - half * low) / torch.where(width > 0, width, 1.0)


def _mapped(scores: Tensor, mask: Tensor, scaled: Callable[[Tensor, slice], Tensor]) -> Tensor:
    mapped = torch.zeros(scores.shape, dtype=sum_dtype(scores.dtype), device=scores.device)
    dtype, largest = accumulator_dtype(scores.device), torch.finfo(mapped.dtype).max
    for rows in row_chunks(scores.shape):
        part = scaled(scores[rows].detach().to(dtype), rows).clamp(-largest, largest)
        mapped[rows] = torch.where(mask[rows], part, 0.0).to(mapped.dtype)
    return mapped


def _require_non_negative(scores: Tensor, mask: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    for rows in row_chunks(mask.shape):
        negative = mask[rows] & (scores[rows] < 0)
        if bool(negative.any()):
            least = scores[rows][negative].min().item()
            hint = "Scores of both signs have `z_scores` and `min_max`."
            raise invalid("mean_one", "scores", ">= 0 under a True mask", least, hint)
