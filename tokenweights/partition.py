"""Who counts: subsets, bins and quadrants of the valid tokens of each response.

Every rule works within one response and depends on its own tokens only, so a partition is the same
however the batch is padded, split or spread over ranks. Random rules are functions of
`(seed, sample id, position)`; see `random_fraction`.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._random import KEY_BITS, random_keys
from tokenweights._typing import typed
from tokenweights.masked import masked_order, masked_ranks, require_finite, row_chunks

MAX_BINS = 10**6
MAX_DENOMINATOR = 10**9


@typed
def bottom_fraction(
    scores: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    fraction: float = 0.2,
) -> Bool[Tensor, "batch token"]:
    r"""The lowest-scored tokens of each response: anchors, when scores are entropies (Eq. 16).

    Of a response with $T$ valid tokens it takes the first $k = \lceil f T \rceil$ of one stable
    ascending order; of equal scores the earlier position comes first. `fraction` is read as the
    nearest ratio of integers up to $10^9$, so `0.1` of 30 tokens is 3, not the 4 that float
    rounding would give; any fraction above 0 counts as at least $10^{-9}$.

    Args:
        scores: Any scores, finite under the mask.
        mask: True for valid response tokens.
        fraction: Share of each response, in [0, 1].

    Returns:
        True for the chosen tokens, a subset of `mask`.

    Raises:
        TokenWeightsError: If `fraction` is outside [0, 1] or a valid score is not finite.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1, 0.5, 0.1]])
        >>> bottom_fraction(scores, torch.ones(1, 4, dtype=torch.bool), fraction=0.25)
        tensor([[False,  True, False, False]])
    """
    require_finite("bottom_fraction", "scores", scores, mask)
    return lowest_ranked(scores, mask, _rounded_up(_ratio("bottom_fraction", fraction)))


@typed
def top_fraction(
    scores: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    fraction: float = 0.2,
) -> Bool[Tensor, "batch token"]:
    r"""The highest-scored tokens of each response: explorers, when scores are entropies (Eq. 16).

    It takes the last $k = \lceil f T \rceil$ of the order that `bottom_fraction` takes the first
    of, so the two never overlap while $2k \le T$.

    Args:
        scores: Any scores, finite under the mask.
        mask: True for valid response tokens.
        fraction: Share of each response, in [0, 1].

    Returns:
        True for the chosen tokens, a subset of `mask`.

    Raises:
        TokenWeightsError: If `fraction` is outside [0, 1] or a valid score is not finite.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1, 0.5, 0.1]])
        >>> top_fraction(scores, torch.ones(1, 4, dtype=torch.bool), fraction=0.5)
        tensor([[ True, False,  True, False]])
    """
    require_finite("top_fraction", "scores", scores, mask)
    counts = _rounded_up(_ratio("top_fraction", fraction))
    return mask & ~lowest_ranked(scores, mask, lambda length: length - counts(length))


@typed
def first_tokens(
    mask: Bool[Tensor, "batch token"], *, count: int = 512
) -> Bool[Tensor, "batch token"]:
    """The first `count` valid tokens of each response, all of a shorter one (Appendix H.1).

    As the mask of a partition or a statistic it takes out the effect of a growing context.

    Args:
        mask: True for valid response tokens.
        count: Tokens of each response, >= 0.

    Returns:
        True for the chosen tokens, a subset of `mask`.

    Raises:
        TokenWeightsError: If `count` is negative.

    Example:
        >>> first_tokens(torch.tensor([[True, False, True, True]]), count=2)
        tensor([[ True, False,  True, False]])
    """
    if count < 0:
        raise invalid("first_tokens", "count", ">= 0", count, "Pass a number of tokens.")
    return mask & (_ordinals(mask) <= min(count, mask.shape[-1]))


@typed
def front_fraction(
    mask: Bool[Tensor, "batch token"], *, fraction: float = 0.2
) -> Bool[Tensor, "batch token"]:
    r"""The first tokens of each response, $\{t : t / T \le f\}$ with $t$ from 1 (Eq. 18).

    Args:
        mask: True for valid response tokens.
        fraction: Share of each response, in [0, 1].

    Returns:
        True for the chosen tokens, a subset of `mask`.

    Raises:
        TokenWeightsError: If `fraction` is outside [0, 1].

    Example:
        >>> front_fraction(torch.ones(1, 4, dtype=torch.bool), fraction=0.5)
        tensor([[ True,  True, False, False]])
    """
    ratio = _ratio("front_fraction", fraction)
    lengths = mask.sum(-1, keepdim=True)
    return mask & (_ordinals(mask) * ratio.denominator <= ratio.numerator * lengths)


@typed
def back_fraction(
    mask: Bool[Tensor, "batch token"], *, fraction: float = 0.2
) -> Bool[Tensor, "batch token"]:
    r"""The last tokens of each response, $\{t : t / T > 1 - f\}$ with $t$ from 1 (Eq. 18).

    Args:
        mask: True for valid response tokens.
        fraction: Share of each response, in [0, 1].

    Returns:
        True for the chosen tokens, a subset of `mask`.

    Raises:
        TokenWeightsError: If `fraction` is outside [0, 1].

    Example:
        >>> back_fraction(torch.ones(1, 4, dtype=torch.bool), fraction=0.5)
        tensor([[False, False,  True,  True]])
    """
    ratio = 1 - _ratio("back_fraction", fraction)
    lengths = mask.sum(-1, keepdim=True)
    return mask & (_ordinals(mask) * ratio.denominator > ratio.numerator * lengths)


@typed
def random_fraction(
    mask: Bool[Tensor, "batch token"],
    *,
    fraction: float = 0.2,
    seed: int,
    sample_ids: Int[Tensor, " batch"] | None = None,
) -> Bool[Tensor, "batch token"]:
    r"""A uniformly random subset of exactly $k = \lceil f T \rceil$ tokens of each response.

    The draw depends on `(seed, sample id, position)` alone, where the position counts valid tokens
    from 0. It is the same on any layout and device, and leaves every global generator alone.

    Args:
        mask: True for valid response tokens.
        fraction: Share of each response, in [0, 1].
        seed: Seed of the draw.
        sample_ids: A number for each response that stays with it however the batch is laid out;
            the row number if None.

    Returns:
        True for the chosen tokens, a subset of `mask`.

    Raises:
        TokenWeightsError: If `fraction` is outside [0, 1].

    Example:
        >>> mask = torch.ones(1, 10, dtype=torch.bool)
        >>> int(random_fraction(mask, fraction=0.2, seed=0).sum())
        2
    """
    counts = _rounded_up(_ratio("random_fraction", fraction))
    return lowest_ranked(_keys(mask, seed, sample_ids), mask, counts)


@typed
def bernoulli_subset(
    mask: Bool[Tensor, "batch token"],
    *,
    probability: float = 0.2,
    seed: int,
    sample_ids: Int[Tensor, " batch"] | None = None,
) -> Bool[Tensor, "batch token"]:
    """A random subset in which every token is drawn independently (Appendix C and D.3).

    The draw depends on `(seed, sample id, position)` alone; see `random_fraction`.

    Args:
        mask: True for valid response tokens.
        probability: Chance of each token, in [0, 1].
        seed: Seed of the draw.
        sample_ids: As in `random_fraction`.

    Returns:
        True for the chosen tokens, a subset of `mask`.

    Raises:
        TokenWeightsError: If `probability` is outside [0, 1].

    Example:
        >>> mask = torch.ones(1, 1000, dtype=torch.bool)
        >>> int(bernoulli_subset(mask, probability=0.2, seed=0).sum())
        194
    """
    if not 0 <= probability <= 1:
        raise invalid(
            "bernoulli_subset", "probability", "in [0, 1]", probability, "Pass a probability."
        )
    return mask & (_keys(mask, seed, sample_ids) < round(probability * 2**KEY_BITS))


@typed
def matched_random(
    subset: Bool[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    groups: Int[Tensor, "batch token"],
    *,
    seed: int,
    sample_ids: Int[Tensor, " batch"] | None = None,
) -> Bool[Tensor, "batch token"]:
    """A random subset with as many tokens of every group, in every response, as `subset` has.

    With token types as groups this is the type-matched control, with position bins the
    position-matched one (Appendix B.9). The draw depends on `(seed, sample id, position)` alone;
    see `random_fraction`.

    Args:
        subset: The subset to match; tokens off the mask are ignored.
        mask: True for valid response tokens.
        groups: Any integer label of each token; values off the mask are ignored.
        seed: Seed of the draw.
        sample_ids: As in `random_fraction`.

    Returns:
        True for the chosen tokens, a subset of `mask`.

    Example:
        >>> mask = torch.ones(1, 6, dtype=torch.bool)
        >>> groups = torch.tensor([[7, 7, 7, 9, 9, 9]])
        >>> subset = torch.tensor([[True, True, False, True, False, False]])
        >>> chosen = matched_random(subset, mask, groups, seed=0)
        >>> int(chosen[:, :3].sum()), int(chosen[:, 3:].sum())
        (2, 1)
    """
    # Sort by group, at random within a group: each group is then one run of each row, and takes
    # its first tokens, as many as `subset` has in that run.
    by_key = masked_order(_keys(mask, seed, sample_ids), mask)
    by_group = masked_order(groups.gather(-1, by_key), mask.gather(-1, by_key))
    order = by_key.gather(-1, by_group)
    sorted_groups, valid = groups.gather(-1, order), mask.gather(-1, order)
    places = torch.arange(mask.shape[-1], device=mask.device).expand_as(order)
    starts_run = torch.ones_like(valid)
    starts_run[:, 1:] = sorted_groups[:, 1:] != sorted_groups[:, :-1]
    run_start = torch.where(starts_run, places, 0).cummax(-1).values
    wanted = torch.zeros_like(order).scatter_add_(
        -1, run_start, ((subset & mask).gather(-1, order)).long()
    )
    chosen = valid & (places - run_start < wanted.gather(-1, run_start))
    return torch.zeros_like(mask).scatter_(-1, order, chosen)


@typed
def quantile_bins(
    scores: Float[Tensor, "batch token"], mask: Bool[Tensor, "batch token"], *, bins: int = 10
) -> Int[Tensor, "batch token"]:
    r"""The quantile bin of each token within its response, 0 for the lowest scores.

    The token of rank $r$ among $T$ falls into bin $\lfloor r B / T \rfloor$, so the sizes of a
    response's bins differ by at most one. Equal scores are ranked by position.

    Args:
        scores: Any scores, finite under the mask.
        mask: True for valid response tokens.
        bins: Number of bins; 10 for deciles.

    Returns:
        Bin numbers in `[0, bins)`, -1 off the mask.

    Raises:
        TokenWeightsError: If `bins` is out of range or a valid score is not finite.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
        >>> quantile_bins(scores, torch.tensor([[True, True, True, False]]), bins=3)
        tensor([[ 2,  0,  1, -1]])
    """
    if not 1 <= bins <= MAX_BINS:
        raise invalid("quantile_bins", "bins", f"in [1, {MAX_BINS}]", bins, "Pass 10 for deciles.")
    require_finite("quantile_bins", "scores", scores, mask)
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, masked_ranks(scores, mask) * bins // lengths, -1)


@typed
def median_quadrants(
    first: Float[Tensor, "batch token"],
    second: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
) -> Int[Tensor, "batch token"]:
    """The quadrant of each token under two scores, split at each response's medians (Eq. 22).

    A score is high when it lies above the median of its response, the mean of the two middle
    values when their number is even; a score at the median is low.

    Args:
        first: For example predictive entropies, finite under the mask.
        second: For example attention entropies, finite under the mask.
        mask: True for valid response tokens.

    Returns:
        0 where both are low, 1 where only `first` is high, 2 where only `second` is high, 3 where
        both are high, -1 off the mask.

    Raises:
        TokenWeightsError: If a valid score is not finite.

    Example:
        >>> first = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> second = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
        >>> median_quadrants(first, second, torch.ones(1, 4, dtype=torch.bool))
        tensor([[0, 2, 1, 3]])
    """
    require_finite("median_quadrants", "first", first, mask)
    require_finite("median_quadrants", "second", second, mask)
    quadrants = _above_median(first, mask).long() + 2 * _above_median(second, mask).long()
    return torch.where(mask, quadrants, -1)


def _above_median(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.shape[-1] == 0:
        return mask
    ordered = torch.where(mask, scores, torch.inf).sort(-1).values
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    # No score lies between the two middle values: what is above the lower one is above their mean,
    # which itself may round to either of them.
    return mask & (scores > ordered.gather(-1, (lengths - 1) // 2))


def _ordinals(mask: Tensor) -> Tensor:
    """The 1-based number of each valid token within its response."""
    return mask.long().cumsum(-1)


def _keys(mask: Tensor, seed: int, sample_ids: Tensor | None) -> Tensor:
    if sample_ids is None:
        sample_ids = torch.arange(mask.shape[0], device=mask.device)
    return random_keys(seed, sample_ids.long(), _ordinals(mask) - 1)


def exact_share(fraction: float) -> Fraction:
    """The nearest ratio of integers up to 10^9, as which every share is read."""
    nearest = Fraction(fraction).limit_denominator(MAX_DENOMINATOR)
    return max(nearest, Fraction(1, MAX_DENOMINATOR)) if fraction > 0 else nearest


def require_share(function: str, fraction: float) -> None:
    """Raise unless `fraction` is in [0, 1], in the name of the public function that takes it."""
    if not 0 <= fraction <= 1:
        raise invalid(function, "fraction", "in [0, 1]", fraction, "Pass a share, 0.2 for 20 %.")


def _ratio(function: str, fraction: float) -> Fraction:
    require_share(function, fraction)
    return exact_share(fraction)


def _rounded_up(ratio: Fraction) -> Callable[[Any], Any]:
    """How many tokens make up a share of a response of some length, exactly."""
    return lambda length: -(-length * ratio.numerator // ratio.denominator)


def lowest_ranked(values: Tensor, mask: Tensor, counts: Callable[[Any], Any]) -> Tensor:
    """The first valid tokens of each response in one stable ascending order, without sorting it.

    What is below the last value that belongs to them does too, and of what equals it the earlier
    positions. To select that value takes a third of a sort's time.

    Args:
        values: Floats that are finite under the mask, or integers short of the extremes.
        mask: True for valid response tokens.
        counts: How many tokens of a response to take, of its length: an integer or a tensor of
            them. For one token more it takes none or one more.

    Returns:
        True for the chosen tokens, a subset of `mask`.
    """
    values = values.detach()
    if torch.compiler.is_compiling():
        return _lowest_ranked(values, mask, counts)
    chunks = row_chunks(mask.shape)
    return torch.cat([_lowest_ranked(values[rows], mask[rows], counts) for rows in chunks])


def _lowest_ranked(values: Tensor, mask: Tensor, counts: Callable[[Any], Any]) -> Tensor:
    last = int(counts(mask.shape[-1]))
    if last == 0:
        return torch.zeros_like(mask)
    wanted = counts(mask.sum(-1, keepdim=True))
    # A shorter response takes fewer tokens. So many of its masked places stand before them that
    # the last one has the rank that it has in a full response, and one search serves all rows.
    if values.is_floating_point():
        low, high = -torch.inf, torch.inf
    else:
        low, high = torch.iinfo(values.dtype).min, torch.iinfo(values.dtype).max
    before = (~mask).cumsum(-1, dtype=torch.int32) <= last - wanted
    filled = torch.where(mask, values, torch.where(before, low, high).to(values.dtype))
    if values.device.type == "cpu":
        cut = filled.kthvalue(last, dim=-1, keepdim=True).values
    else:  # where `torch.use_deterministic_algorithms` refuses a selection
        cut = filled.sort(-1).values[..., last - 1 : last]
    below, equal = mask & (filled < cut), mask & (filled == cut)
    missing = wanted - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))
