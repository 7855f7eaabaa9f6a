"""Selections: the lowest or highest tokens of a response, of a prompt, or of a batch over ranks.

A cut through one order of tokens is found digit by digit: histograms of eight bits of the scores,
then of the sample ids where a tie has to be split, each summed over the ranks. Counts travel,
tokens never do, and all sums are of integers, so that every layout gives the same tokens.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.distributed import _communicating, _reduced, agreed, is_shared
from tokenweights.masked import (
    CHUNK_TOKENS,
    accumulator_dtype,
    require_finite,
    sum_dtype,
)
from tokenweights.partition import _ratio, _rounded_up, lowest_ranked
from tokenweights.scopes import Scope, Sign, candidates, segments

Side = Literal["top", "bottom"]

DIGITS = 256
BLOCK_TOKENS = 2**16  # a few MiB of temporaries
MASS_BITS = 30
# More tokens, and more mass, than there ever are: `2**33` tokens of the largest mass.
EVERY = 2**62


@agreed
@typed
def select(
    scores: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    side: Side = "top",
    fraction: float | None = None,
    count: int | None = None,
    threshold: float | None = None,
    scope: Scope = "response",
    prompt_ids: Int[Tensor, " batch"] | None = None,
    advantages: Float[Tensor, "batch #token"] | None = None,
    sign: Sign = "any",
    sample_ids: Int[Tensor, " batch"] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Bool[Tensor, "batch token"]:
    r"""The highest or lowest tokens of each response, prompt or batch: a share, a number, a cut.

    The $n$ candidates of a set stand in one ascending order by (score, sample id, ordinal of the
    token in its response), in which -0.0 equals 0.0. The bottom is its first $k$ tokens and the top
    its last $k$, where $k = \lceil f n \rceil$ for a fraction, read as in `bottom_fraction`, and
    $k = \min(c, n)$ for a count. A threshold ranks nothing: the top is every token of at least
    that score, the bottom of at most that score, compared as exact numbers.

    Under the scope `"response"` it never communicates. Under `"prompt"` and `"batch"` ranks
    exchange 2 KiB for each set in each of at most 16 rounds, see `selection_bytes`. Memory beyond
    the result is a chunk of tokens, a histogram for each set and, with a sign, the candidates.

    Args:
        scores: Any scores, finite under the mask; half precision is widened.
        mask: True for valid response tokens.
        side: Which end of the order.
        fraction: Share of each set, in [0, 1]. Give exactly one of this and the next two.
        count: Tokens of each set, >= 0; all of a smaller one.
        threshold: A score; the scope then has no effect.
        scope: What ranks as one set: a response, all responses to a prompt, or all of all ranks.
        prompt_ids: For the scope `"prompt"`: a number for each response, equal for responses to one
            prompt.
        advantages: For a sign: one for each token or each response, finite under the mask.
        sign: Only tokens whose advantage has this sign are candidates, and count.
        sample_ids: A number for each response, which orders equal scores and stays with it however
            the batch is laid out; the row number if None.
        group: The ranks that share the batch, all of which have to call; None if this is all.

    Returns:
        True for the chosen tokens, a subset of `mask`.

    Raises:
        TokenWeightsError: If not exactly one of `fraction`, `count` and `threshold` is given, or it
            is out of range; if a valid score or advantage is not finite; if an argument is missing
            for the scope, the sign or the group; if responses of equal sample id tie at the cut.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.7, 0.2]])
        >>> mask = torch.ones(2, 3, dtype=torch.bool)
        >>> select(scores, mask, fraction=0.5, scope="batch")
        tensor([[ True, False, False],
                [ True,  True, False]])
    """
    given = [argument for argument in (fraction, count, threshold) if argument is not None]
    if len(given) != 1:
        hint = "Name the share, the number or the score to cut at."
        raise invalid("select", "fraction", "alone, or `count` or `threshold`", given, hint)
    batch = _candidates("select", scores, mask, advantages, sign)
    if threshold is not None:
        if math.isnan(threshold):
            raise invalid("select", "threshold", "a number", threshold, "Pass a score.")
        return _beyond(batch, side, threshold)
    if count is not None and count < 0:
        raise invalid("select", "count", ">= 0", count, "Pass a number of tokens.")

    def at_most(size: Any) -> Any:
        return torch.as_tensor(size).clamp(max=min(count or 0, EVERY))

    wanted = at_most if fraction is None else _rounded_up(_ratio("select", fraction))

    def first(size: Any) -> Any:
        return wanted(size) if side == "bottom" else size - wanted(size)

    if scope == "response":
        before = lowest_ranked(batch.scores, batch.own, first)
        return before if side == "bottom" else batch.own & ~before
    sample_ids = _own_ids("select", mask, scope, sample_ids, group)
    words = f"select by {fraction=}, {count=}, {side=}, {scope=}, {sign=}"

    def chosen(part: "_Batch") -> Tensor:
        cut = first(part.sizes())
        place = _place(part, lambda counts, _: counts < cut[:, None])
        return _marked("select", part, side, place, cut - place.before)

    return _over_parts("select", words, batch, mask, scope, prompt_ids, sample_ids, group, chosen)


@agreed
@typed
def select_within(
    scores: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    total: float | None = None,
    mean: float | None = None,
    side: Side = "bottom",
    scope: Scope = "response",
    prompt_ids: Int[Tensor, " batch"] | None = None,
    advantages: Float[Tensor, "batch #token"] | None = None,
    sign: Sign = "any",
    sample_ids: Int[Tensor, " batch"] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Bool[Tensor, "batch token"]:
    r"""As many of the lowest or highest tokens as stay within a budget of their sum or mean.

    Of the order of `select` it takes, from the given side, the longest run of tokens whose scores
    add up to at most `total`, or whose mean is at most `mean`. M2PO (arXiv 2510.01161) so keeps
    tokens by their squared log-ratios, the mean of which it bounds at 0.04.

    Sums are exact, and the same on any layout, since scores count as whole multiples of a unit: the
    nearest multiple of $2^{e-30}$, where $2^e$ is the power of two next above the largest absolute
    score of the set's candidates. The budget is rounded down to a multiple. Scores of few binary
    digits, such as small integers, are thus taken as they are, and a score below half a unit, at
    most $2^{-30}$ of the largest, counts as 0. Sums are exact up to $2^{32}$ tokens of a set.

    Args:
        scores: Any scores, finite under the mask, and >= 0 there for a `total`.
        mask: True for valid response tokens.
        total: Budget of the sum, >= 0. Give exactly one of this and `mean`.
        mean: Budget of the mean; the side then has to be `"bottom"`, from where means only rise.
        side: The end of the order at which to begin.
        scope: As in `select`.
        prompt_ids: As in `select`.
        advantages: As in `select`.
        sign: As in `select`.
        sample_ids: As in `select`.
        group: As in `select`.

    Returns:
        True for the chosen tokens, a subset of `mask`.

    Raises:
        TokenWeightsError: If not exactly one of `total` and `mean` is given, or it is out of range;
            if a candidate's score is negative beside a `total`; and as in `select`.

    Example:
        >>> squares = torch.tensor([[0.01, 0.5, 0.02, 0.06]])
        >>> select_within(squares, torch.ones(1, 4, dtype=torch.bool), mean=0.04)
        tensor([[ True, False,  True,  True]])
    """
    name = "select_within"
    given = [argument for argument in (total, mean) if argument is not None]
    if len(given) != 1:
        raise invalid(name, "total", "alone, or `mean`", given, "Name the sum or the mean.")
    if total is not None and not total >= 0:
        raise invalid(name, "total", ">= 0", total, "Pass a sum of scores.")
    if mean is not None and math.isnan(mean):
        raise invalid(name, "mean", "a number", mean, "Pass a mean of scores.")
    if mean is not None and side != "bottom":
        hint = "Means only rise from the bottom; from the top, name a total."
        raise invalid(name, "side", "'bottom' for a `mean`", side, hint)
    batch = _candidates(name, scores, mask, advantages, sign)
    if total is not None:
        for block in _blocks(mask.shape):
            negative = batch.own[block] & (batch.scores[block] < 0)
            if bool(negative.any()):
                got = batch.scores[block][negative].min().item()
                hint = "A sum of scores of both signs neither rises nor falls."
                raise invalid(name, "scores", ">= 0 for a `total`", got, hint)
    sample_ids = _own_ids(name, mask, scope, sample_ids, group)
    words = f"select within {total=}, {mean=}, {side=}, {scope=}, {sign=}"

    def chosen(part: "_Batch") -> Tensor:
        part = part.weighed(descending=side == "top")
        if total is not None:
            budget, slope = part.units(total, 0, EVERY), 0
        else:
            # A score has at most 2**30 units, so a budget beyond that is as good as this.
            budget, slope = 0, part.units(mean or 0.0, -(2**MASS_BITS) - 1, 2**MASS_BITS)

        def within(counts: Tensor, masses: Tensor) -> Tensor:
            return masses - _column(slope) * counts <= _column(budget)

        place = _place(part, within)
        # How many of the tokens that tie, of some units each, fit into what is left.
        excess = part.masses(place.key) - slope
        left = budget - (place.mass - slope * place.before)
        fitting = torch.where(excess > 0, left // excess.clamp(min=1), place.equal)
        quota = fitting.clamp(min=0).minimum(place.equal)
        if side == "top":
            part, quota = part.ascending(), place.equal - quota
            place = replace(place, key=~place.key)
        return _marked(name, part, side, place, quota)

    return _over_parts(name, words, batch, mask, scope, prompt_ids, sample_ids, group, chosen)


@agreed
@typed
def score_quantile(
    scores: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    fraction: float,
    scope: Scope = "response",
    prompt_ids: Int[Tensor, " batch"] | None = None,
    advantages: Float[Tensor, "batch #token"] | None = None,
    sign: Sign = "any",
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "batch 1"]:
    r"""The score below which a share of each response, prompt or batch lies, for each response.

    Of the $n$ candidates in ascending order, numbered from 0, it interpolates linearly at place
    $f (n - 1)$, as `torch.quantile` does. The order statistics are exact over ranks.

    Args:
        scores: Any scores, finite under the mask.
        mask: True for valid response tokens.
        fraction: In [0, 1]; 0.5 for the median.
        scope: As in `select`.
        prompt_ids: As in `select`.
        advantages: As in `select`.
        sign: As in `select`.
        group: As in `select`.

    Returns:
        The quantile of the set that each response belongs to, float32 or, for float64 scores,
        float64; NaN for a set without candidates, and for a response without a valid token unless
        the scope is `"batch"`. No gradient.

    Raises:
        TokenWeightsError: If `fraction` is outside [0, 1], a valid score or advantage is not
            finite, or an argument is missing for the scope or the sign.

    Example:
        >>> scores = torch.tensor([[0.0, 1.0, 2.0, 10.0]])
        >>> score_quantile(scores, torch.ones(1, 4, dtype=torch.bool), fraction=0.5)
        tensor([[1.5000]])
    """
    name = "score_quantile"
    if not 0 <= fraction <= 1:
        raise invalid(name, "fraction", "in [0, 1]", fraction, "Pass a share, 0.5 for the median.")
    batch = _candidates(name, scores, mask, advantages, sign)
    words = f"quantile of {fraction=}, {scope=}, {sign=}"

    def quantile(part: "_Batch") -> Tensor:
        sizes = part.sizes()
        at = (sizes - 1).clamp(min=0).to(accumulator_dtype(sizes.device)) * fraction
        lower = at.floor().long()
        place = _place(part, lambda counts, _: counts <= lower[:, None])
        # The next order statistic is another score only where the lower one ends its ties.
        ends = (at > lower) & (lower + 1 >= place.before + place.equal)
        upper = torch.where(ends, part.next_key(place.key), place.key) if ends.any() else place.key
        low, high = (part.floats(key).to(at.dtype) for key in (place.key, upper))
        share = at - lower
        value = torch.where(low == high, low, low * (1 - share) + high * share)
        value = value.clamp(low, high).where(sizes > 0, torch.nan)
        return value.to(sum_dtype(part.scores.dtype))[part.rows, None]

    result = _over_parts(name, words, batch, mask, scope, prompt_ids, None, group, quantile)
    if scope == "batch":
        return result
    return result.where(mask.any(-1, keepdim=True), torch.nan)


@typed
def selection_bytes(*, dtype: torch.dtype, ties: bool = True) -> int:
    """Bytes that a rank hands to collectives in one `select` over a batch, whatever its size.

    They are histograms of 256 integers, one for each byte of a score, half precision being widened
    to float32, and for each byte of a sample id; the two counts and the ranks' agreement besides.

    Args:
        dtype: Of the scores.
        ties: Whether equal scores have to be told apart at the cut; without, it is fewer.

    Returns:
        Bytes; with ties, 24,616 for float32 and 32,808 for float64.

    Raises:
        TokenWeightsError: If `dtype` is not a float.

    Example:
        >>> selection_bytes(dtype=torch.float32)
        24616
    """
    if not dtype.is_floating_point:
        raise invalid("selection_bytes", "dtype", "a float", dtype, "Pass that of the scores.")
    integer, agreement, size = 8, 3 * 8, 8
    digits = sum_dtype(dtype).itemsize
    of_ids = integer * (8 * DIGITS + 1) if ties else 0
    return agreement + size + integer * DIGITS * digits + of_ids


# A batch and its keys.


@dataclass(frozen=True)
class _Batch:
    """Scores as ordered integers, block by block, and the set of each row."""

    scores: Tensor
    own: Tensor  # the candidates
    rows: Tensor
    sets: int
    group: dist.ProcessGroup | None
    sample_ids: Tensor | None  # None where a set is one row
    exponents: Tensor | None = None  # of the unit of each set, negated; None where masses are not
    descending: bool = False

    @property
    def bits(self) -> int:
        return 64 if self.scores.dtype == torch.float64 else 32

    def keys(self, block: tuple[slice, slice]) -> Tensor:
        """Signed integers in the order of the scores; of the reversed order if descending."""
        wide = self.scores[block].to(sum_dtype(self.scores.dtype))
        keys = _flipped(wide.view(torch.int64 if self.bits == 64 else torch.int32), self.bits)
        keys = keys + (keys == -1)  # -0.0 becomes 0.0
        return ~keys if self.descending else keys

    def floats(self, keys: Tensor) -> Tensor:
        """The scores of which these are the keys."""
        keys = ~keys if self.descending else keys
        if self.bits == 64:
            return _flipped(keys, 64).view(torch.float64)
        return _flipped(keys.to(torch.int32), 32).view(torch.float32)

    def sizes(self) -> Tensor:
        """Number of candidates of each set."""
        sizes = self.rows.new_zeros(self.sets)
        for block in _blocks(self.own.shape):
            sizes.index_add_(0, self.rows[block[0]], self.own[block].sum(-1))
        return _summed(sizes, self.group)

    def weighed(self, *, descending: bool) -> "_Batch":
        """The batch with a unit of mass for each set."""
        dtype = sum_dtype(self.scores.dtype)
        largest = torch.zeros(self.sets, dtype=dtype, device=self.own.device)
        for rows, tokens in _blocks(self.own.shape):
            sizes = torch.where(self.own[rows, tokens], self.scores[rows, tokens].abs(), 0)
            largest.scatter_reduce_(0, self.rows[rows], sizes.amax(-1).to(dtype), "amax")
        if self.group is not None:
            largest = _reduced(largest, dist.ReduceOp.MAX, self.group)
        exponents = MASS_BITS - torch.frexp(largest).exponent.long()
        return replace(self, exponents=exponents, descending=descending)

    def ascending(self) -> "_Batch":
        return replace(self, exponents=None, descending=False)

    def masses(self, keys: Tensor, rows: slice | None = None) -> Tensor:
        """The scores of these keys in whole units: one for each set, or of each token of rows."""
        assert self.exponents is not None
        exponents = self.exponents if rows is None else self.exponents[self.rows[rows], None]
        return _scaled(self.floats(keys), exponents).round().long()

    def units(self, value: float, low: int, high: int) -> Tensor:
        """A score as a number of units of each set, rounded down, within bounds."""
        assert self.exponents is not None
        values = self.exponents.new_full(
            (self.sets,), value, dtype=accumulator_dtype(self.own.device)
        )
        return _scaled(values, self.exponents).clamp(low, high).floor().long()

    def histogram(self, prefix: Tensor, shift: int) -> Tensor:
        """Counts, and masses if weighed, of each set by a digit, where higher ones are a prefix."""
        columns = 1 if self.exponents is None else 2
        found = self.rows.new_zeros(columns, self.sets * DIGITS)
        first = shift == self.bits - 8
        for block in _blocks(self.own.shape):
            keys, live, rows = self.keys(block), self.own[block], self.rows[block[0], None]
            if not first:
                live = live & (keys >> (shift + 8) == (prefix >> (shift + 8))[rows].to(keys.dtype))
            places = ((keys >> shift) + (128 if first else 0) & 255)[live].long()
            if self.sets > 1:
                places += (rows * DIGITS).expand(live.shape)[live]
            found[0].scatter_add_(0, places, torch.ones_like(places))
            if columns == 2:
                found[1].scatter_add_(0, places, self.masses(keys, block[0])[live])
        return found.view(columns, self.sets, DIGITS)

    def ties(self, key: Tensor) -> Tensor:
        """How many candidates of each row have the key of their set."""
        ties = torch.zeros_like(self.rows)
        for block in _blocks(self.own.shape):
            ties[block[0]] += self._tied(self.keys(block), block, key).sum(-1)
        return ties

    def _tied(self, keys: Tensor, block: tuple[slice, slice], key: Tensor) -> Tensor:
        return self.own[block] & (keys == key[self.rows[block[0]], None].to(keys.dtype))

    def next_key(self, key: Tensor) -> Tensor:
        """The smallest key of each set above the given one."""
        last = torch.iinfo(torch.int64).max
        found = torch.full_like(key, last)
        for block in _blocks(self.own.shape):
            keys, rows = self.keys(block).long(), self.rows[block[0]]
            above = torch.where(self.own[block] & (keys > key[rows, None]), keys, last)
            found.scatter_reduce_(0, rows, above.amin(-1), "amin")
        return found if self.group is None else _reduced(found, dist.ReduceOp.MIN, self.group)

    def first(self, key: Tensor, quotas: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Block by block, what comes before the cut: lower keys, and of each row some ties."""
        limits = (key[self.rows] + (quotas == EVERY))[:, None]
        split = (quotas > 0) & (quotas < EVERY)
        seen = torch.zeros_like(quotas)
        for block in _blocks(self.own.shape):
            rows, keys = block[0], self.keys(block)
            before = keys < limits[rows].to(keys.dtype)
            if bool(split[rows].any()):
                ties = self._tied(keys, block, key) & split[rows, None]
                ordinals = ties.cumsum(-1) + seen[rows, None]
                before |= ties & (ordinals <= quotas[rows, None])
                seen[rows] += ties.sum(-1)
            yield block, before


def _flipped(bits: Tensor, width: int) -> Tensor:
    """Bits of floats as integers of the same order, and such integers as bits of floats."""
    return bits ^ (bits >> (width - 1) & (2 ** (width - 1) - 1))


def _scaled(values: Tensor, exponents: Tensor) -> Tensor:
    """Values times powers of two, in two steps, since one power may be too large for the type."""
    half = exponents // 2
    return values * _power(half, values.dtype) * _power(exponents - half, values.dtype)


def _power(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float64:
        return ((exponents + 1023) << 52).view(torch.float64)
    return ((exponents + 127) << 23).to(torch.int32).view(torch.float32)


def _column(values: Tensor | int) -> Tensor | int:
    return values if isinstance(values, int) else values[:, None]


def _blocks(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Chunks of rows, and of the tokens of a row that is longer than a chunk."""
    step = max(BLOCK_TOKENS // max(shape[1], 1), 1)
    for first in range(0, shape[0], step):
        for start in range(0, shape[1], BLOCK_TOKENS):
            yield slice(first, first + step), slice(start, start + BLOCK_TOKENS)


def _summed(counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The one merge of this module: integers, summed over ranks."""
    return counts if group is None else _reduced(counts, dist.ReduceOp.SUM, group)


# Input.


def _candidates(
    function: str, scores: Tensor, mask: Tensor, advantages: Tensor | None, sign: Sign
) -> _Batch:
    """The checked input, each response a set of its own."""
    scores = scores.detach()
    _require_finite(function, "scores", scores, mask)
    own = mask
    if sign != "any":
        if advantages is None:
            candidates(function, mask, advantages=None, sign=sign)  # refuses
        assert advantages is not None
        advantages = advantages.detach().expand(mask.shape)
        _require_finite(function, "advantages", advantages, mask)
        own = torch.empty_like(mask)
        for block in _blocks(mask.shape):
            own[block] = candidates(function, mask[block], advantages=advantages[block], sign=sign)
    rows = torch.arange(len(mask), device=mask.device)
    return _Batch(scores, own, rows, len(mask), None, None)


def _require_finite(function: str, argument: str, values: Tensor, mask: Tensor) -> None:
    for block in _blocks(mask.shape):
        if not bool((torch.isfinite(values[block]) | ~mask[block]).all()):
            require_finite(function, argument, values, mask)


def _own_ids(
    function: str,
    mask: Tensor,
    scope: Scope,
    sample_ids: Tensor | None,
    group: dist.ProcessGroup | None,
) -> Tensor:
    if sample_ids is not None:
        return sample_ids.long()
    if scope != "response" and is_shared(group):
        condition = f"given for the scope {scope!r} and a group"
        hint = "Row numbers are not the same on every layout: pass a number for each response."
        raise invalid(function, "sample_ids", condition, None, hint)
    return torch.arange(len(mask), device=mask.device)


def _over_parts(
    function: str,
    words: str,
    batch: _Batch,
    mask: Tensor,
    scope: Scope,
    prompt_ids: Tensor | None,
    sample_ids: Tensor | None,
    group: dist.ProcessGroup | None,
    result: Callable[[_Batch], Tensor],
) -> Tensor:
    """A result for all rows at once or, where each row is a set, for a few hundred at a time."""
    if scope == "response":
        whole: Tensor | None = None
        for rows in _row_parts(batch.own.shape):
            own = batch.own[rows]
            part = replace(batch, scores=batch.scores[rows], own=own, sets=len(own))
            found = result(replace(part, rows=batch.rows[: len(own)]))
            whole = found.new_empty(len(batch.own), found.shape[1]) if whole is None else whole
            whole[rows] = found
        assert whole is not None  # there is one part, even of no rows
        return whole
    if prompt_ids is None or scope == "batch":
        # Missing prompts are refused here, before the ranks agree to go on.
        sets = segments(function, mask, scope=scope, prompt_ids=None, group=group)
        _communicating(words, group)
    else:
        _communicating(words, group)
        sets = segments(function, mask, scope=scope, prompt_ids=prompt_ids, group=group)
    count = max(sets.count, 1)  # where no rank has a token
    return result(
        replace(batch, rows=sets.rows, sets=count, group=sets.group, sample_ids=sample_ids)
    )


def _row_parts(shape: torch.Size) -> Iterator[slice]:
    """Chunks of rows, as few as keep histograms small as well."""
    step = min(max(CHUNK_TOKENS // max(shape[1], 1), 1), 1024)
    for start in range(0, max(shape[0], 1), step):
        yield slice(start, start + step)


def _beyond(batch: _Batch, side: Side, threshold: float) -> Tensor:
    chosen = torch.empty_like(batch.own)
    for block in _blocks(batch.own.shape):
        scores = batch.scores[block].to(accumulator_dtype(batch.own.device))
        kept = scores >= threshold if side == "top" else scores <= threshold
        chosen[block] = batch.own[block] & kept
    return chosen


# The search.


@dataclass(frozen=True)
class _Place:
    """The key at the cut of each set, and how many candidates lie before it and have it."""

    key: Tensor
    before: Tensor
    mass: Tensor  # of those before
    equal: Tensor


def _place(part: _Batch, within: Callable[[Tensor, Tensor], Tensor]) -> _Place:
    """Where the order of scores leaves the bounds of each set, see `_descended`."""
    return _descended(part.histogram, part.bits, part, within)


def _descended(
    histogram: Callable[[Tensor, int], Tensor],
    bits: int,
    part: _Batch,
    within: Callable[[Tensor, Tensor], Tensor],
) -> _Place:
    """Where an order of integers leaves the bounds of each set; its last one if it never does.

    Args:
        histogram: Counts, and masses if bounds ask for them, of the digit at a shift among the
            integers that begin with a prefix.
        bits: Of the integers, which are signed.
        part: The sets and the ranks that share them.
        within: Whether a run of the order is within its bounds, by the number and the mass of its
            tokens: true of the first runs, and then no more.

    Returns:
        The place of the first integer beyond the bounds.
    """
    key, before, mass, equal = part.rows.new_zeros(4, part.sets).unbind()
    for shift in range(bits - 8, -1, -8):
        found = _summed(histogram(key, shift), part.group)
        counts, masses = found[0], found[-1]  # without masses, these are not looked at
        ends = counts.cumsum(-1)
        inside = within(before[:, None] + ends, mass[:, None] + masses.cumsum(-1)).sum(-1)
        last = (ends < ends[:, -1:]).sum(-1)  # the last digit that occurs
        digit = inside.minimum(last)[:, None]
        key = key + ((digit[:, 0] - (128 if shift == bits - 8 else 0)) << shift)
        equal = counts.gather(-1, digit)[:, 0]
        before = before + ends.gather(-1, digit)[:, 0] - equal
        mass = mass + (masses.cumsum(-1) - masses).gather(-1, digit)[:, 0]
    return _Place(key, before, mass, equal)


def _marked(function: str, part: _Batch, side: Side, place: _Place, quota: Tensor) -> Tensor:
    """The tokens on one side of a cut that leaves so many ties of each set before it."""
    quotas = _row_quotas(function, part, place, quota)
    chosen = torch.empty_like(part.own)
    for block, first in part.first(place.key, quotas):
        chosen[block] = part.own[block] & (first if side == "bottom" else ~first)
    return chosen


def _row_quotas(function: str, part: _Batch, place: _Place, quota: Tensor) -> Tensor:
    """How many ties of each row come before the cut; `EVERY` for all of them."""
    of_sets = torch.where(quota >= place.equal, EVERY, quota)
    quotas = of_sets[part.rows]
    split = (of_sets > 0) & (of_sets < EVERY)
    # All of this is decided by sums over the ranks, which then take the same steps.
    if part.sample_ids is None or not bool(split.any()):
        return quotas
    ids, rows = part.sample_ids, part.rows
    ties = torch.where(split[rows], part.ties(place.key), 0)

    def histogram(prefix: Tensor, shift: int) -> Tensor:
        first = shift == 56
        live = ties if first else ties * (ids >> (shift + 8) == (prefix >> (shift + 8))[rows])
        digits = (ids >> shift) + (128 if first else 0) & 255
        found = rows.new_zeros(part.sets * DIGITS)
        return found.scatter_add_(0, rows * DIGITS + digits, live).view(1, part.sets, DIGITS)

    cut = _descended(histogram, 64, part, lambda counts, _: counts < quota[:, None])
    at_cut = (ties > 0) & (ids == cut.key[rows])
    owners = _summed(rows.new_zeros(part.sets).index_add_(0, rows, at_cut.long()), part.group)
    rest = quota - cut.before
    unclear = split & (rest < cut.equal) & (owners > 1)
    if bool(unclear.any()):
        number = int(cut.key[unclear][0])
        got = f"{int(owners[unclear][0])} responses of number {number}"
        hint = "Their equal scores cannot be told apart: number each response differently."
        raise invalid(function, "sample_ids", "different where scores tie at the cut", got, hint)
    all_of_it = torch.where(rest >= cut.equal, EVERY, rest)
    by_id = torch.where(ids < cut.key[rows], EVERY, torch.where(at_cut, all_of_it[rows], 0))
    return torch.where(split[rows], by_id, quotas)
