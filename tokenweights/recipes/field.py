"""Rules of the field: maps of a score, bands, additive terms, and masks that carry a budget.

Each is said in general; the named recipes give the numbers that their papers do.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tokenweights._random import random_keys
from tokenweights.distributed import global_extrema, global_sum
from tokenweights.likelihood import sampled_probability
from tokenweights.masked import accumulator_dtype, masked_extrema, require_finite
from tokenweights.partition import exact_share
from tokenweights.recipes.batch import RolloutBatch
from tokenweights.recipes.parts import Part, decimal, require_numbers
from tokenweights.recipes.rules import MIN_WEIGHT, given_scores, require_weight, two_weights
from tokenweights.scaling import bounded_map, mean_one, min_max, z_scores
from tokenweights.schedules import MAX_WEIGHT
from tokenweights.scopes import Scope, Sign, candidates
from tokenweights.selection import score_quantile, select, select_within

Group = dist.ProcessGroup | None
Normalised = Literal["none", "mean", "deviation", "range"]
SCOPES = {
    "response": "the response",
    "prompt": "the prompt's responses",
    "batch": "the rollout batch",
}


@dataclass(frozen=True, kw_only=True)
class Mapped(Part):
    """A bounded map of the score, which may be normalised over a scope first.

    Attributes:
        normalise: `"none"`; `"mean"`, over the mean; `"deviation"`, a z-score; `"range"`, min-max.
        scope: Over what: the response, all responses to a prompt, or the rollout batch.
        per: Whether each `"token"` counts once, or each `"response"` with its mean.
        shape: `"linear"`, offset + slope x; `"exponential"`, exp(offset + slope x); `"sigmoid"`,
            sigmoid(offset + slope x).
        slope: See `shape`.
        offset: See `shape`.
        low: Smallest weight.
        high: Largest weight.
    """

    kind: ClassVar[str] = "mapped"

    normalise: Normalised = "none"
    scope: Scope = "batch"
    per: Literal["token", "response"] = "token"
    shape: Literal["linear", "exponential", "sigmoid"] = "linear"
    slope: float = 1.0
    offset: float = 0.0
    low: float = 0.0
    high: float = MAX_WEIGHT

    def _check(self) -> None:
        self.require_number("slope", "offset")
        require_weight(self, "low", "high")
        self.require("high", self.low <= self.high, f">= low, {decimal(self.low)}")

    @property
    def numbers(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of prompts where it is normalised over their responses."""
        return () if self.normalise == "none" or self.scope != "prompt" else ("prompt_ids",)

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights in [low, high]."""
        require_numbers(self, batch, group)
        values = given_scores(self, scores)
        if self.normalise != "none":
            normal = {"mean": mean_one, "deviation": z_scores, "range": min_max}[self.normalise]
            values = normal(
                values,
                batch.mask,
                scope=self.scope,
                prompt_ids=batch.prompt_ids,
                per=self.per,
                group=group,
            )
        weights = bounded_map(
            values.to(torch.promote_types(values.dtype, torch.float32)),
            shape=self.shape,
            slope=self.slope,
            offset=self.offset,
            low=self.low,
            high=self.high,
        )
        return torch.where(batch.mask, weights, 0.0).float()

    def lines(self) -> list[str]:
        """The equation."""
        x = {"none": "s", "mean": "s / mean s", "deviation": "z(s)", "range": "minmax(s)"}
        term = ("" if abs(self.slope) == 1 else f"{decimal(abs(self.slope))} ") + x[self.normalise]
        sign = "-" if self.slope < 0 else "+"
        if self.offset:
            line = f"{decimal(self.offset)} {sign} {term}"
        else:
            line = term if sign == "+" else f"-{term}"
        outer = {"linear": line, "exponential": f"exp({line})", "sigmoid": f"sigmoid({line})"}
        upper = "" if self.high == MAX_WEIGHT else decimal(self.high)
        bounded = self.low > 0 or upper or self.shape == "linear"
        bounds = f"{decimal(self.low)}, {upper or 'inf'}"
        whole = outer[self.shape]
        lines = [f"w = clip({whole}, {bounds})" if bounded else f"w = {whole}"]
        if self.normalise != "none":
            lines.append(f"over {SCOPES[self.scope]}, each {self.per} once")
        return lines


@dataclass(frozen=True, kw_only=True)
class Within(Part):
    """A band of scores: tokens outside of it get weight 0.

    Attributes:
        low: Smallest score that is kept.
        high: Largest score that is kept.
        weight: What a kept token weighs: `"one"`, or its `"score"`, which has to be >= 0.
    """

    kind: ClassVar[str] = "within"
    low: float
    high: float
    weight: Literal["one", "score"] = "one"

    def _check(self) -> None:
        least = 0.0 if self.weight == "score" else -torch.inf
        self.require_number("low", "high", least=least)
        self.require("high", self.low <= self.high, f">= low, {decimal(self.low)}")

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights by the band."""
        scores = given_scores(self, scores)
        kept = batch.mask & (scores >= self.low) & (scores <= self.high)
        return torch.where(kept, scores if self.weight == "score" else 1.0, 0.0).float()

    def lines(self) -> list[str]:
        """The band."""
        weight = "1" if self.weight == "one" else "s"
        return [f"w = {weight} where {decimal(self.low)} <= s <= {decimal(self.high)}, else 0"]


@dataclass(frozen=True, kw_only=True)
class AboveQuantile(Part):
    """Tokens whose score is at least a quantile of a scope, all ties included.

    Where scores tie at the quantile it takes more tokens than `Top`, which takes a count.

    Attributes:
        quantile: In [0, 1], by linear interpolation between order statistics.
        scope: Over what the quantile is taken.
    """

    kind: ClassVar[str] = "above_quantile"
    quantile: float = 0.8
    scope: Scope = "batch"

    def _check(self) -> None:
        self.require_number("quantile", least=0, most=1)

    @property
    def numbers(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of prompts where the quantile is that of their responses."""
        return ("prompt_ids",) if self.scope == "prompt" else ()

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights by the threshold."""
        require_numbers(self, batch, group)
        # Between neighbouring float32 scores there is none: compare as exactly as interpolated.
        scores = given_scores(self, scores).to(accumulator_dtype(batch.mask.device))
        threshold = score_quantile(
            scores,
            batch.mask,
            fraction=self.quantile,
            scope=self.scope,
            prompt_ids=batch.prompt_ids,
            group=group,
        )
        return two_weights(batch.mask & (scores >= threshold), batch.mask, inside=1.0, outside=0.0)

    def lines(self) -> list[str]:
        """The threshold."""
        share, scope = decimal(100 * self.quantile), SCOPES[self.scope]
        return [f"w = 1 where s >= its {share}% quantile over {scope}, else 0"]


@dataclass(frozen=True, kw_only=True)
class Bonus(Part):
    r"""A term added to the advantage, as a factor on it, bounded by a share of the advantage.

    With $\psi = \min(\alpha s, |A| / \kappa)$, and 0 for a negative score, the advantage
    $A + \psi$ is $A (1 + \psi / A)$, and $A + \mathrm{sign}(A) \psi$ is $A (1 + \psi / |A|)$.
    Where the advantage is 0 the weight is 1.

    Attributes:
        scale: $\alpha \ge 0$.
        share: $\kappa \ge 1$.
        towards: `"plus"` adds, `"sign"` adds in the direction of the advantage.
    """

    kind: ClassVar[str] = "bonus"
    columns: ClassVar[tuple[str, ...]] = ("advantages",)
    scale: float
    share: float = 2.0
    towards: Literal["plus", "sign"] = "plus"

    def _check(self) -> None:
        self.require_number("scale", least=0)
        self.require_number("share", least=1)

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights in [1 - 1 / share, 1 + 1 / share]."""
        signs = [_of_sign(self, batch, sign) for sign in ("positive", "negative")]
        dtype = accumulator_dtype(batch.mask.device)
        size = _advantages(batch).to(dtype).abs().where(signs[0] | signs[1], 1.0)
        term = (self.scale * given_scores(self, scores).to(dtype)).clamp(min=0)
        change = torch.minimum(term, size / self.share) / size
        up = signs[0] | signs[1] if self.towards == "sign" else signs[0]
        weights = torch.where(up, 1 + change, torch.where(signs[1], 1 - change, 1.0))
        return torch.where(batch.mask, weights, 0.0).float()

    def lines(self) -> list[str]:
        """The equation."""
        over = "A" if self.towards == "plus" else "|A|"
        return [f"w = 1 + min({decimal(self.scale)} s, |A| / {decimal(self.share)}) / {over}"]


@dataclass(frozen=True, kw_only=True)
class RandomDrop(Part):
    """Weight 0 for randomly chosen tokens of a band of scores, 1 for all others.

    The choice depends on `(seed, sample id, position)` alone.

    Attributes:
        low: Scores have to be above it.
        high: Scores have to be below it.
        fraction: How many tokens are chosen, as a share of all valid tokens of the rollout batch;
            at least one of those in the band.
        seed: Of the draw.
    """

    kind: ClassVar[str] = "random_drop"
    numbers: ClassVar[tuple[str, ...]] = ("sample_ids",)
    low: float
    high: float
    fraction: float = 2e-4
    seed: int = 0

    def _check(self) -> None:
        self.require_number("low", "high")
        self.require_number("fraction", least=0, most=1)

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights of the draw."""
        require_numbers(self, batch, group)
        scores, mask = given_scores(self, scores), batch.mask
        band = mask & (scores > self.low) & (scores < self.high)
        own = mask.sum().to(accumulator_dtype(mask.device))
        tokens = int(global_sum(own, group=group))
        places = mask.long().cumsum(-1) - 1
        rows = torch.arange(len(mask), device=mask.device)
        sample_ids = rows if batch.sample_ids is None else batch.sample_ids.long()
        keys = random_keys(self.seed, sample_ids, places)
        dropped = select(
            keys.double(),  # 53 bits, exactly
            band,
            side="bottom",
            count=max(int(exact_share(self.fraction) * tokens), 1),
            scope="batch",
            sample_ids=sample_ids,
            group=group,
        )
        return two_weights(dropped, mask, inside=0.0, outside=1.0)

    def lines(self) -> list[str]:
        """The band and the share."""
        band = f"{decimal(self.low)} < s < {decimal(self.high)}"
        share = f"{decimal(100 * self.fraction)}% of the rollout batch"
        return [f"w = 0 for random tokens with {band}, {share}, else 1; seed {self.seed}"]


@dataclass(frozen=True, kw_only=True)
class RarePositives(Part):
    """Weight 0 for improbable tokens of low entropy in responses of positive advantage.

    Attributes:
        probability: A token is improbable below it.
        quantile: Entropies are low below this quantile.
        among: Tokens over which the quantile is taken, in the rollout batch: the `"improbable"`
            ones of positive advantage, or `"all"`.
    """

    kind: ClassVar[str] = "rare_positives"
    columns: ClassVar[tuple[str, ...]] = ("log_probs", "predictive_entropy", "advantages")
    scored: ClassVar[bool] = False
    probability: float = 0.002
    quantile: float = 0.75
    among: Literal["improbable", "all"] = "improbable"

    def _check(self) -> None:
        self.require_number("probability", "quantile", least=0, most=1)

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights by the two thresholds."""
        log_probs, entropy = batch.log_probs, batch.predictive_entropy
        assert log_probs is not None and entropy is not None
        require_finite(self.kind, "log_probs", log_probs, batch.mask)
        require_finite(self.kind, "predictive_entropy", entropy, batch.mask)
        positive = _of_sign(self, batch, "positive")
        rare = positive & (sampled_probability(log_probs) < self.probability)
        among = rare if self.among == "improbable" else batch.mask
        threshold = score_quantile(
            entropy, among, fraction=self.quantile, scope="batch", group=group
        )
        return two_weights(rare & (entropy < threshold), batch.mask, inside=0.0, outside=1.0)

    def lines(self) -> list[str]:
        """The three conditions."""
        among = "all tokens" if self.among == "all" else "tokens with A > 0 and such p"
        return [
            f"w = 0 where A > 0, p < {decimal(self.probability)} and H < q, else 1",
            f"q the {decimal(100 * self.quantile)}% quantile of H over {among}, rollout batch",
        ]


@dataclass(frozen=True, kw_only=True)
class SecondMoment(Part):
    """Weight 0 for the largest ratios to the sampler that the clip would act on.

    Looked at are tokens with A > 0 and ratio above 1, or A < 0 and ratio below 1. Of these the
    largest squared log-ratios are dropped until the mean of the rest is at most the bound.

    Attributes:
        bound: Of the mean squared log-ratio.
    """

    kind: ClassVar[str] = "second_moment"
    columns: ClassVar[tuple[str, ...]] = ("log_probs", "sampler_log_probs", "advantages")
    scored: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = ("sample_ids",)
    bound: float = 0.04

    def _check(self) -> None:
        self.require_number("bound", least=0)

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights by the budget."""
        require_numbers(self, batch, group)
        assert batch.log_probs is not None and batch.sampler_log_probs is not None
        require_finite(self.kind, "log_probs", batch.log_probs, batch.mask)
        require_finite(self.kind, "sampler_log_probs", batch.sampler_log_probs, batch.mask)
        dtype = accumulator_dtype(batch.mask.device)
        ratio = batch.log_probs.to(dtype) - batch.sampler_log_probs.to(dtype)
        ratio = torch.where(batch.mask, ratio, 0.0)
        looked_at = (_of_sign(self, batch, "positive") & (ratio > 0)) | (
            _of_sign(self, batch, "negative") & (ratio < 0)
        )
        kept = select_within(
            ratio.square(),
            looked_at,
            mean=self.bound,
            scope="batch",
            sample_ids=batch.sample_ids,
            group=group,
        )
        return two_weights(looked_at & ~kept, batch.mask, inside=0.0, outside=1.0)

    def lines(self) -> list[str]:
        """The budget."""
        return [
            "w = 0 for the largest (log p - log p_sampler)^2 where A (p - p_sampler) > 0, else 1",
            f"until their mean over the rollout batch is at most {decimal(self.bound)}",
        ]


@dataclass(frozen=True, kw_only=True)
class Damped(Part):
    """Weights that fall from 1 at score 0 to a floor at the largest score of the rollout batch.

    Attributes:
        floor: Weight at the largest score.
        least: The largest score is taken to be at least this.
    """

    kind: ClassVar[str] = "damped"
    floor: float = 0.8
    least: float = 0.02

    def _check(self) -> None:
        self.require("floor", MIN_WEIGHT <= self.floor <= 1, "in [1e-20, 1]")
        self.require("least", 0 < self.least < torch.inf, "positive and finite")

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights in [floor, 1] for scores >= 0."""
        scores = given_scores(self, scores).abs().to(accumulator_dtype(batch.mask.device))
        _, largest = global_extrema(*masked_extrema(scores, batch.mask), group=group)
        share = torch.where(batch.mask, scores, 0.0) / largest.clamp(min=self.least)
        return torch.where(batch.mask, self.floor**share, 0.0).float()

    def lines(self) -> list[str]:
        """The equation."""
        floor, least = decimal(self.floor), decimal(self.least)
        return [f"w = {floor} ^ (|s| / max(largest |s| of the rollout batch, {least}))"]


def _advantages(batch: RolloutBatch) -> Tensor:
    assert batch.advantages is not None
    return batch.advantages.expand(batch.mask.shape)


def _of_sign(part: Part, batch: RolloutBatch, sign: Sign) -> Tensor:
    return candidates(part.kind, batch.mask, advantages=batch.advantages, sign=sign)


ALL: tuple[type[Part], ...] = (
    Mapped,
    Within,
    AboveQuantile,
    Bonus,
    RandomDrop,
    RarePositives,
    SecondMoment,
    Damped,
)
