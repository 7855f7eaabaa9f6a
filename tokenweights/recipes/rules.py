"""The rules of the paper: uniform, soft endpoints, and hard subsets of each response.

Soft weights and the subsets are the functions of `tokenweights.weights` and
`tokenweights.partition`; a rule holds their parameters and its schedule.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tokenweights._errors import invalid
from tokenweights.partition import (
    MAX_BINS,
    back_fraction,
    bernoulli_subset,
    bottom_fraction,
    front_fraction,
    matched_random,
    quantile_bins,
    random_fraction,
    top_fraction,
)
from tokenweights.recipes.batch import RolloutBatch
from tokenweights.recipes.parts import Part, decimal, require_numbers
from tokenweights.schedules import (
    MAX_WEIGHT,
    Endpoints,
    Schedule,
    constant_schedule,
    cosine_schedule,
    linear_schedule,
    piecewise_schedule,
)
from tokenweights.scopes import Scope, Sign
from tokenweights.selection import select
from tokenweights.signals import relative_position
from tokenweights.weights import endpoint_weights, subset_weights

ScheduleKind = Literal["constant", "linear", "cosine", "step"]
Side = Literal["bottom", "top"]
Group = dist.ProcessGroup | None

# Below it the denominator "weight_sum" would need a scale that float32 cannot hold.
MIN_WEIGHT = 1e-20

# What a choice of a share of a scope takes, see `Part.numbers`.
NUMBERS: dict[Scope, tuple[str, ...]] = {
    "response": (),
    "prompt": ("sample_ids", "prompt_ids"),
    "batch": ("sample_ids",),
}


@dataclass(frozen=True, kw_only=True)
class Uniform(Part):
    """Weight 1 for every token (Eq. 1)."""

    kind: ClassVar[str] = "uniform"
    scored: ClassVar[bool] = False

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Ones on the mask."""
        return subset_weights(batch.mask)

    def lines(self) -> list[str]:
        """The equation."""
        return ["w = 1 for every token  (Eq. 1)"]


@dataclass(frozen=True, kw_only=True)
class EndpointWeights(Part):
    """Soft weights between two endpoints that move on a schedule (Eq. 26-30).

    Attributes:
        low: Weight at the lowest score, at the start and at the end of the schedule.
        high: Weight at the highest score, at the start and at the end of the schedule.
        schedule: `"linear"` (Eq. 29, 30), `"cosine"`, `"step"` (a jump at `warmup_steps`), or
            `"constant"` (the start values for good).
        warmup_steps: Length of the schedule. The paper's text does not give its value; 100 is ours.
        temperature: Of the softmax in Eq. 26. The paper's text does not give its value; 1 is ours.
        form: `"stable"`, or `"literal"` for Eq. 26 and 27 as printed.
        eps: Epsilon of the literal form. The paper's text does not give its value.
    """

    kind: ClassVar[str] = "endpoints"

    low: tuple[float, float] = (1.0, 0.0)
    high: tuple[float, float] = (0.0, 1.0)
    schedule: ScheduleKind = "linear"
    warmup_steps: int = 100
    temperature: float = 1.0
    form: Literal["stable", "literal"] = "stable"
    eps: float = 1e-8

    def _check(self) -> None:
        self.require("warmup_steps", self.warmup_steps >= 0, ">= 0")
        for name in ("temperature", "eps"):
            self.require(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        for name in ("low", "high"):
            pair = getattr(self, name)
            fits = len(pair) == 2 and all(
                value == 0 or MIN_WEIGHT <= value <= MAX_WEIGHT for value in pair
            )
            condition = "two weights, at the start and at the end, each 0 or in [1e-20, 1e30]"
            self.require(name, fits, condition)

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights at a training step; extrema span the rollout batch."""
        return endpoint_weights(
            given_scores(self, scores),
            batch.mask,
            self.endpoints(step),
            temperature=self.temperature,
            form=self.form,
            eps=self.eps,
            group=group,
        )

    def endpoints(self, step: int) -> Endpoints:
        """Weights of the lowest-scored and of the highest-scored token at a training step.

        Args:
            step: Training step, from 0.

        Returns:
            The endpoints.
        """
        return Endpoints(self._schedule(self.low)(step), self._schedule(self.high)(step))

    def _schedule(self, pair: tuple[float, float]) -> Schedule:
        start, end = pair
        if self.schedule == "constant":
            return constant_schedule(start)
        if self.schedule == "step":
            if self.warmup_steps == 0:
                return constant_schedule(end)
            return piecewise_schedule([start, end], [self.warmup_steps])
        make = linear_schedule if self.schedule == "linear" else cosine_schedule
        return make(start, end, self.warmup_steps)

    def lines(self) -> list[str]:
        """The equations; the schedule is in `schedule_line`."""
        eps = f", eps {decimal(self.eps)}" if self.form == "literal" else ""
        return [
            "w = (1 - abar) w_low + abar w_high  (Eq. 28)",
            f"abar = softmax(H / {decimal(self.temperature)}) rescaled to [0, 1] "
            f"over the rollout batch, {self.form} form{eps}  (Eq. 26, 27)",
        ]

    def schedule_line(self) -> str:
        """How the endpoints move."""
        pairs = (map(decimal, pair) for pair in (self.low, self.high))
        (low, last_low), (high, last_high) = pairs
        if self.schedule == "constant":
            return f"w_low = {low}, w_high = {high}"
        shapes = {
            "linear": f"linear, {self.warmup_steps} steps  (Eq. 29, 30)",
            "cosine": f"half a cosine, {self.warmup_steps} steps",
            "step": f"a jump at step {self.warmup_steps}",
        }
        return f"w_low {low} -> {last_low}, w_high {high} -> {last_high}, {shapes[self.schedule]}"


@dataclass(frozen=True, kw_only=True)
class Subset(Part):
    """Weight 1 for a share of each response, 0 for the rest.

    Attributes:
        fraction: Share of each response.
    """

    fraction: float = 0.2

    def _check(self) -> None:
        self.require("fraction", 0 <= self.fraction <= 1, "in [0, 1]")

    def _share(self) -> str:
        return f"{decimal(100 * self.fraction)}% of each response"


@dataclass(frozen=True, kw_only=True)
class Edge(Subset):
    """The lowest-scored or the highest-scored tokens of a scope, exactly; see `select`.

    Attributes:
        fraction: Share of the scope's candidates.
        scope: Among which tokens they are ranked: one response, all responses to a prompt, or the
            rollout batch over all ranks.
        sign: Sign of the advantage that makes a token a candidate.
        inside: Weight of the chosen tokens.
        outside: Weight of all others, also of those that are no candidates.
    """

    scope: Scope = "response"
    sign: Sign = "any"
    inside: float = 1.0
    outside: float = 0.0

    side: ClassVar[Side]

    @property
    def columns(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The advantages where their sign matters."""
        return () if self.sign == "any" else ("advantages",)

    @property
    def numbers(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those that tell ties of several responses apart, and prompts."""
        return NUMBERS[self.scope]

    def _check(self) -> None:
        super()._check()
        require_weight(self, "inside", "outside")

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights by rank."""
        require_numbers(self, batch, group)
        chosen = select(
            given_scores(self, scores),
            batch.mask,
            side=self.side,
            fraction=self.fraction,
            scope=self.scope,
            prompt_ids=batch.prompt_ids,
            advantages=batch.advantages,
            sign=self.sign,
            sample_ids=batch.sample_ids,
            group=group,
        )
        return two_weights(chosen, batch.mask, inside=self.inside, outside=self.outside)

    def lines(self) -> list[str]:
        """Share, scope and weights."""
        where = {"response": "each response", "prompt": "each prompt's responses"}
        scope = where.get(self.scope, "the rollout batch")
        tokens = {"any": "", "positive": " with A > 0", "negative": " with A < 0"}[self.sign]
        edge = "lowest" if self.side == "bottom" else "highest"
        share = decimal(100 * self.fraction)
        inside, outside = decimal(self.inside), decimal(self.outside)
        equation = "  (Eq. 16)" if self.is_papers else ""
        return [
            f"w = {inside} for the {edge} {share}% of {scope}{tokens}, else {outside}{equation}"
        ]

    @property
    def is_papers(self) -> bool:
        """Whether this is the paper's own rule, but for the fraction."""
        own = (self.scope, self.sign, self.inside, self.outside)
        return own == ("response", "any", 1.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Bottom(Edge):
    """The lowest-scored tokens: anchors, when scores are entropies (Eq. 16)."""

    kind: ClassVar[str] = "bottom"
    side: ClassVar[Side] = "bottom"


@dataclass(frozen=True, kw_only=True)
class Top(Edge):
    """The highest-scored tokens: explorers, when scores are entropies (Eq. 16)."""

    kind: ClassVar[str] = "top"
    side: ClassVar[Side] = "top"


@dataclass(frozen=True, kw_only=True)
class Front(Subset):
    """The first tokens of each response (Eq. 18)."""

    kind: ClassVar[str] = "front"
    scored: ClassVar[bool] = False

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights by position."""
        return subset_weights(front_fraction(batch.mask, fraction=self.fraction))

    def lines(self) -> list[str]:
        """The share."""
        return [f"w = 1 for the first {self._share()}, else 0  (Eq. 18)"]


@dataclass(frozen=True, kw_only=True)
class Back(Subset):
    """The last tokens of each response (Eq. 18)."""

    kind: ClassVar[str] = "back"
    scored: ClassVar[bool] = False

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights by position."""
        return subset_weights(back_fraction(batch.mask, fraction=self.fraction))

    def lines(self) -> list[str]:
        """The share."""
        return [f"w = 1 for the last {self._share()}, else 0  (Eq. 18)"]


@dataclass(frozen=True, kw_only=True)
class Random(Subset):
    """A random subset of exactly a share of each response, by `(seed, sample id, position)`.

    Attributes:
        seed: Of the draw.
    """

    kind: ClassVar[str] = "random"
    scored: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = ("sample_ids",)
    seed: int = 0

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights of the draw."""
        require_numbers(self, batch, group)
        keys = {"seed": self.seed, "sample_ids": batch.sample_ids}
        return subset_weights(random_fraction(batch.mask, fraction=self.fraction, **keys))

    def lines(self) -> list[str]:
        """Share and seed."""
        return [f"w = 1 for a random {self._share()}, else 0; seed {self.seed}"]


@dataclass(frozen=True, kw_only=True)
class Bernoulli(Subset):
    """Every token with the same probability, by `(seed, sample id, position)` (Appendix C).

    Attributes:
        fraction: Probability of a token.
        seed: Of the draw.
    """

    kind: ClassVar[str] = "bernoulli"
    scored: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = ("sample_ids",)
    seed: int = 0

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights of the draw."""
        require_numbers(self, batch, group)
        keys = {"seed": self.seed, "sample_ids": batch.sample_ids}
        return subset_weights(bernoulli_subset(batch.mask, probability=self.fraction, **keys))

    def lines(self) -> list[str]:
        """Probability and seed."""
        return [f"w = 1 with probability {decimal(self.fraction)}, else 0; seed {self.seed}"]


@dataclass(frozen=True, kw_only=True)
class Matched(Subset):
    """Random tokens, as many of every group as the lowest or highest share of each response has.

    Attributes:
        matched_to: The subset, `"bottom"` or `"top"` by score, that is imitated.
        seed: Of the draw.
    """

    numbers: ClassVar[tuple[str, ...]] = ("sample_ids",)
    matched_to: Side = "bottom"
    seed: int = 0

    def __call__(
        self, scores: Tensor | None, batch: RolloutBatch, *, step: int, group: Group = None
    ) -> Tensor:
        """Weights of the draw."""
        require_numbers(self, batch, group)
        partition = bottom_fraction if self.matched_to == "bottom" else top_fraction
        subset = partition(given_scores(self, scores), batch.mask, fraction=self.fraction)
        keys = {"seed": self.seed, "sample_ids": batch.sample_ids}
        return subset_weights(matched_random(subset, batch.mask, self._groups(batch), **keys))

    def _groups(self, batch: RolloutBatch) -> Tensor:
        raise NotImplementedError

    def _matched(self, groups: str) -> list[str]:
        return [
            f"w = 1 for random tokens, else 0; seed {self.seed}",
            f"as many {groups} as the {self.matched_to} {self._share()} has",
        ]


@dataclass(frozen=True, kw_only=True)
class TypeMatched(Matched):
    """The type-matched control: groups are token ids (Appendix B.9)."""

    kind: ClassVar[str] = "type_matched"
    columns: ClassVar[tuple[str, ...]] = ("token_ids",)

    def _groups(self, batch: RolloutBatch) -> Tensor:
        batch.require(self.columns, caller=self.kind)
        assert batch.token_ids is not None
        return batch.token_ids

    def lines(self) -> list[str]:
        """What is matched."""
        return self._matched("of each type")


@dataclass(frozen=True, kw_only=True)
class PositionMatched(Matched):
    """The position-matched control: groups are bins of relative position (Appendix B.9).

    Attributes:
        position_bins: Number of bins.
    """

    kind: ClassVar[str] = "position_matched"
    position_bins: int = 10

    def _check(self) -> None:
        super()._check()
        self.require("position_bins", 1 <= self.position_bins <= MAX_BINS, f"in [1, {MAX_BINS}]")

    def _groups(self, batch: RolloutBatch) -> Tensor:
        return quantile_bins(relative_position(batch.mask), batch.mask, bins=self.position_bins)

    def lines(self) -> list[str]:
        """What is matched."""
        return self._matched(f"in each of {self.position_bins} position bins")


def two_weights(chosen: Tensor, mask: Tensor, *, inside: float, outside: float) -> Tensor:
    """One weight for the chosen tokens, another for the other valid ones, 0 off the mask."""
    weights = torch.full(mask.shape, outside, dtype=torch.float32, device=mask.device)
    return weights.masked_fill_(chosen, inside).masked_fill_(~mask, 0.0)


def require_weight(rule: Part, *fields: str) -> None:
    """Raises unless fields are weights that every denominator can divide by."""
    for field in fields:
        value = getattr(rule, field)
        fits = value == 0 or MIN_WEIGHT <= value <= MAX_WEIGHT
        rule.require(field, fits, "0 or in [1e-20, 1e30]")


def given_scores(rule: Part, scores: Tensor | None) -> Tensor:
    """The scores that a rule needs; an error where there are none."""
    if scores is None:
        hint = "Give the recipe a signal."
        raise invalid(rule.kind, "scores", "given, one for each token", None, hint)
    return scores


ALL: tuple[type[Part], ...] = (
    Uniform,
    EndpointWeights,
    Bottom,
    Top,
    Front,
    Back,
    Random,
    Bernoulli,
    TypeMatched,
    PositionMatched,
)
