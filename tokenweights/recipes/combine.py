"""Parts made of parts: by sign, products, gates, ranks and means."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from tokenweights.distributed import global_sum
from tokenweights.masked import accumulator_dtype, masked_ranks, masked_sum, require_finite
from tokenweights.recipes.batch import RolloutBatch
from tokenweights.recipes.parts import Part, Rule, Signal, columns_of, decimal, label, part_lines
from tokenweights.recipes.rules import Uniform
from tokenweights.scopes import Sign, candidates

Group = dist.ProcessGroup | None


@dataclass(frozen=True, kw_only=True)
class Ranked(Part):
    """Rank of each token's score within its response, scaled to [0, 1]; ties by position.

    Attributes:
        signal: What is ranked.
    """

    kind: ClassVar[str] = "ranked"
    signal: Signal

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """Ranks over `T - 1`."""
        last = (batch.mask.sum(-1, keepdim=True) - 1).clamp(min=1)
        return masked_ranks(self.signal(batch), batch.mask).float() / last

    def lines(self) -> list[str]:
        """What is ranked."""
        return ["rank within the response, in [0, 1], of", *part_lines(self.signal)]


@dataclass(frozen=True, kw_only=True)
class MeanOf(Part):
    """Mean of the scores of several signals. Of signals with different units, take ranks first.

    Attributes:
        signals: What is averaged, with equal shares.
    """

    kind: ClassVar[str] = "mean_of"
    signals: tuple[Signal, ...]

    def _check(self) -> None:
        self.require("signals", len(self.signals) > 0, "not empty")

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """The mean."""
        return torch.stack([signal(batch).float() for signal in self.signals]).mean(0)

    def lines(self) -> list[str]:
        """What is averaged."""
        return ["mean of", *(line for signal in self.signals for line in part_lines(signal))]


@dataclass(frozen=True, kw_only=True)
class BySign(Part):
    """One rule for tokens of positive advantage, another for those of negative advantage.

    Where the advantage is 0 the weight is 1: it multiplies nothing, and keeps counts as they are.

    Attributes:
        positive: The rule where the advantage is above 0.
        negative: The rule where it is below 0.
    """

    kind: ClassVar[str] = "by_sign"
    columns: ClassVar[tuple[str, ...]] = ("advantages",)
    positive: Rule
    negative: Rule

    @property
    def scored(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether one of the two needs scores."""
        return needs_scores(self.positive) or needs_scores(self.negative)

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """The weights of both, each where it holds."""
        weights = batch.mask.float()
        rules: dict[Sign, Rule] = {"positive": self.positive, "negative": self.negative}
        for sign, rule in rules.items():
            mine = rule(scores, batch, step=step, group=group)
            chosen = candidates(self.kind, batch.mask, advantages=batch.advantages, sign=sign)
            weights = torch.where(chosen, mine, weights)
        return weights

    def lines(self) -> list[str]:
        """Both rules."""
        return [
            *(f"A > 0: {line}" for line in part_lines(self.positive)),
            *(f"A < 0: {line}" for line in part_lines(self.negative)),
        ]


@dataclass(frozen=True, kw_only=True)
class Product(Part):
    """The product of the weights of several rules.

    Attributes:
        rules: The factors.
    """

    kind: ClassVar[str] = "product"
    rules: tuple[Rule, ...]

    def _check(self) -> None:
        self.require("rules", len(self.rules) > 0, "not empty")

    @property
    def scored(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether one of them needs scores."""
        return any(map(needs_scores, self.rules))

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """The product."""
        weights = batch.mask.float()
        for rule in self.rules:
            weights = weights * rule(scores, batch, step=step, group=group)
        return weights

    def lines(self) -> list[str]:
        """The factors."""
        return ["product of", *(line for rule in self.rules for line in part_lines(rule))]


@dataclass(frozen=True, kw_only=True)
class On(Part):
    """A rule on a signal of its own, whatever the recipe's signal is.

    Attributes:
        signal: What scores the tokens.
        rule: What makes weights of them.
    """

    kind: ClassVar[str] = "on"
    scored: ClassVar[bool] = False
    signal: Signal
    rule: Rule

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """The rule's weights."""
        batch.require(columns_of(self.signal), caller=self.kind)
        scores = self.signal(batch)
        require_finite(label(self.signal), "scores", scores, batch.mask)
        return self.rule(scores, batch, step=step, group=group)

    def lines(self) -> list[str]:
        """Signal and rule."""
        return [*part_lines(self.rule), *(f"of {line}" for line in part_lines(self.signal))]


@dataclass(frozen=True, kw_only=True)
class BatchMean(Part):
    """The condition that the mean of a signal over the rollout batch lies in a range.

    Attributes:
        signal: What is averaged over all valid tokens of all ranks.
        below: The mean has to be below it; None for no such bound.
        above: The mean has to be above it; None for no such bound.
    """

    kind: ClassVar[str] = "batch_mean"
    signal: Signal
    below: float | None = None
    above: float | None = None

    def _check(self) -> None:
        self.require_number("below", "above")
        bounded = self.below is not None or self.above is not None
        self.require("below", bounded, "given, or `above`")
        if self.below is not None and self.above is not None:
            self.require("below", self.above < self.below, f"above {decimal(self.above)}")

    def __call__(self, batch: RolloutBatch, *, step: int, group: Group = None) -> bool:
        """Whether it holds; not for a batch without a token."""
        scores, dtype = self.signal(batch), accumulator_dtype(batch.mask.device)
        require_finite(label(self.signal), "scores", scores, batch.mask)
        own = [masked_sum(scores.to(dtype), batch.mask), batch.mask.sum().to(dtype)]
        total, count = global_sum(torch.stack(own), group=group).tolist()
        if count == 0:
            return False
        mean = total / count
        low = self.above is None or mean > self.above
        return low and (self.below is None or mean < self.below)

    def lines(self) -> list[str]:
        """The range and the signal."""
        above = "" if self.above is None else f" above {decimal(self.above)}"
        below = "" if self.below is None else f" below {decimal(self.below)}"
        first, *rest = part_lines(self.signal)
        return [f"mean over batch{above}{below} of {first}", *rest]


@dataclass(frozen=True, kw_only=True)
class Steps(Part):
    """The condition that the training step lies in a range.

    Attributes:
        start: First step.
        stop: First step after the range; None for no end.
    """

    kind: ClassVar[str] = "steps"
    start: int = 0
    stop: int | None = None

    def _check(self) -> None:
        self.require("start", self.start >= 0, ">= 0")
        self.require("stop", self.stop is None or self.stop >= self.start, f">= {self.start}")

    def __call__(self, batch: RolloutBatch, *, step: int, group: Group = None) -> bool:
        """Whether it holds."""
        return self.start <= step and (self.stop is None or step < self.stop)

    def lines(self) -> list[str]:
        """The range."""
        return [f"from step {self.start}" + ("" if self.stop is None else f" to {self.stop - 1}")]


@dataclass(frozen=True, kw_only=True)
class Gate(Part):
    """A rule that holds while a condition does; every token counts the same otherwise.

    Attributes:
        rule: The rule.
        when: The condition, `BatchMean` or `Steps`.
        otherwise: The rule where the condition does not hold.
    """

    kind: ClassVar[str] = "gate"
    rule: Rule
    when: BatchMean | Steps
    otherwise: Rule = Uniform()  # noqa: RUF009 - a frozen record

    @property
    def scored(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether one of the rules needs scores."""
        return needs_scores(self.rule) or needs_scores(self.otherwise)

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """The weights of the rule that holds."""
        # The condition is the same on all ranks, and so is the rule that communicates.
        holds = self.when(batch, step=step, group=group)
        return (self.rule if holds else self.otherwise)(scores, batch, step=step, group=group)

    def lines(self) -> list[str]:
        """Rule and condition."""
        first, *rest = part_lines(self.when)
        lines = [*part_lines(self.rule), f"while {first}", *rest]
        if self.otherwise == Uniform():
            return [*lines, "otherwise w = 1 for every token"]
        return [*lines, *(f"otherwise {line}" for line in part_lines(self.otherwise))]


def needs_scores(rule: Any) -> bool:
    """Whether a rule needs scores; one of a user's that does not say so does."""
    return bool(getattr(rule, "scored", True))


SIGNALS: tuple[type[Part], ...] = (Ranked, MeanOf)
RULES: tuple[type[Part], ...] = (BySign, Product, On, Gate)
CONDITIONS: tuple[type[Part], ...] = (BatchMean, Steps)
