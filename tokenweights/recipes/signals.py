"""Signals as parts of a recipe: which columns of a batch become the scores, by which function.

The functions are those of `tokenweights.signals` and `tokenweights.likelihood`. Attention entropy
has a file of its own.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenweights.likelihood import (
    advantage_covariance,
    entropy_sensitivity,
    importance_ratio,
    log_perplexity,
    reference_divergence,
    relative_surprisal,
    sampled_probability,
    surprisal,
)
from tokenweights.masked import accumulator_dtype
from tokenweights.recipes.attention import AttentionEntropy as AttentionEntropy
from tokenweights.recipes.backward import BackwardDistance as BackwardDistance
from tokenweights.recipes.backward import FutureInfluence as FutureInfluence
from tokenweights.recipes.batch import RolloutBatch
from tokenweights.recipes.parts import Part, decimal
from tokenweights.signals import loss_magnitude, relative_position


@dataclass(frozen=True, kw_only=True)
class PredictiveEntropy(Part):
    """Entropy of the next-token distribution, nats (Eq. 19)."""

    kind: ClassVar[str] = "predictive_entropy"
    columns: ClassVar[tuple[str, ...]] = ("predictive_entropy",)

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """The column."""
        return _there(batch.predictive_entropy)

    def lines(self) -> list[str]:
        """The equation."""
        return ["predictive entropy, H = -sum p log p  (Eq. 19)"]


@dataclass(frozen=True, kw_only=True)
class LossMagnitude(Part):
    """Magnitude of each token's loss (Eq. 23), in loops that have it: no trainer has at rollout."""

    kind: ClassVar[str] = "loss_magnitude"
    columns: ClassVar[tuple[str, ...]] = ("token_loss",)

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """The magnitude of the column."""
        return loss_magnitude(_there(batch.token_loss))

    def lines(self) -> list[str]:
        """The equation."""
        return ["loss magnitude, |l|  (Eq. 23)"]


@dataclass(frozen=True, kw_only=True)
class LogProb(Part):
    """Log-probability of each sampled token, nats."""

    kind: ClassVar[str] = "log_prob"
    columns: ClassVar[tuple[str, ...]] = ("log_probs",)

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """The column."""
        return _there(batch.log_probs)

    def lines(self) -> list[str]:
        """The equation."""
        return ["log-probability of the sampled token, log p"]


@dataclass(frozen=True, kw_only=True)
class Probability(Part):
    """Probability of each sampled token, in [0, 1]."""

    kind: ClassVar[str] = "probability"
    columns: ClassVar[tuple[str, ...]] = ("log_probs",)

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """The exponential of the column."""
        return sampled_probability(_there(batch.log_probs))

    def lines(self) -> list[str]:
        """The equation."""
        return ["probability of the sampled token, p"]


@dataclass(frozen=True, kw_only=True)
class Surprisal(Part):
    """Surprisal of each sampled token, nats."""

    kind: ClassVar[str] = "surprisal"
    columns: ClassVar[tuple[str, ...]] = ("log_probs",)

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """The column's negative."""
        return surprisal(_there(batch.log_probs))

    def lines(self) -> list[str]:
        """The equation."""
        return ["surprisal of the sampled token, -log p"]


@dataclass(frozen=True, kw_only=True)
class RelativeSurprisal(Part):
    """Surprisal of each sampled token over the entropy it was drawn with."""

    kind: ClassVar[str] = "relative_surprisal"
    columns: ClassVar[tuple[str, ...]] = ("log_probs", "predictive_entropy")

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """The quotient; see `relative_surprisal`."""
        entropy = _there(batch.predictive_entropy)
        return relative_surprisal(_there(batch.log_probs), entropy, batch.mask)

    def lines(self) -> list[str]:
        """The equation."""
        return ["surprisal over predictive entropy, -log p / H"]


@dataclass(frozen=True, kw_only=True)
class Covariance(Part):
    """Covariance of advantage and log-probability, each token's share of it."""

    kind: ClassVar[str] = "covariance"
    columns: ClassVar[tuple[str, ...]] = ("log_probs", "advantages")

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """The product of both deviations from their means over the rollout batch."""
        log_probs, advantages = _there(batch.log_probs), _there(batch.advantages)
        return advantage_covariance(log_probs, advantages, batch.mask, group=batch.group)

    def lines(self) -> list[str]:
        """The equation."""
        return ["covariance, (A - mean A) (log p - mean log p), means over the rollout batch"]


@dataclass(frozen=True, kw_only=True)
class EntropySensitivity(Part):
    """Size of the first-order change of a token's entropy under its update."""

    kind: ClassVar[str] = "entropy_sensitivity"
    columns: ClassVar[tuple[str, ...]] = ("log_probs", "predictive_entropy", "advantages")

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """See `entropy_sensitivity`."""
        return entropy_sensitivity(
            _there(batch.log_probs), _there(batch.predictive_entropy), _there(batch.advantages)
        )

    def lines(self) -> list[str]:
        """The equation."""
        return ["size of the entropy's change, |A| (1 - p) |log p + H|"]


@dataclass(frozen=True, kw_only=True)
class SamplerRatio(Part):
    """Probability of each sampled token in the trainer over that in the inference engine."""

    kind: ClassVar[str] = "sampler_ratio"
    columns: ClassVar[tuple[str, ...]] = ("log_probs", "sampler_log_probs")

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """See `importance_ratio`."""
        return importance_ratio(_there(batch.log_probs), _there(batch.sampler_log_probs))

    def lines(self) -> list[str]:
        """The equation."""
        return ["trainer's over sampler's probability, p / p_sampler"]


@dataclass(frozen=True, kw_only=True)
class ReferenceDivergence(Part):
    """Estimate of the divergence from the reference policy at each sampled token, nats, >= 0."""

    kind: ClassVar[str] = "reference_divergence"
    columns: ClassVar[tuple[str, ...]] = ("log_probs", "reference_log_probs")

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """See `reference_divergence`."""
        return reference_divergence(_there(batch.log_probs), _there(batch.reference_log_probs))

    def lines(self) -> list[str]:
        """The equation."""
        return ["divergence from the reference, p_ref / p - 1 - log(p_ref / p)"]


@dataclass(frozen=True, kw_only=True)
class Position(Part):
    """Relative position of each token in its response, t / T in (0, 1] (Eq. 18)."""

    kind: ClassVar[str] = "position"

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """See `relative_position`."""
        return relative_position(batch.mask)

    def lines(self) -> list[str]:
        """The equation."""
        return ["relative position, t / T"]


@dataclass(frozen=True, kw_only=True)
class PositionSigmoid(Part):
    """A smooth step over the response, from near 0 at its start to near 1 at its end.

    Attributes:
        steepness: Of the step.
        middle: Relative position of its middle.
    """

    kind: ClassVar[str] = "position_sigmoid"
    steepness: float = 15.0
    middle: float = 0.5

    def _check(self) -> None:
        self.require_number("steepness", "middle")

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """The sigmoid of the relative position."""
        return torch.sigmoid(self.steepness * (relative_position(batch.mask) - self.middle))

    def lines(self) -> list[str]:
        """The equation."""
        steep, middle = decimal(self.steepness), decimal(self.middle)
        return [f"position, sigmoid({steep} (t / T - {middle}))"]


@dataclass(frozen=True, kw_only=True)
class LogPerplexity(Part):
    """Mean surprisal of each response, at each of its tokens, nats."""

    kind: ClassVar[str] = "log_perplexity"
    columns: ClassVar[tuple[str, ...]] = ("log_probs",)

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """See `log_perplexity`."""
        return log_perplexity(_there(batch.log_probs), batch.mask)

    def lines(self) -> list[str]:
        """The equation."""
        return ["log-perplexity of the response, mean of -log p"]


@dataclass(frozen=True, kw_only=True)
class ResponseCertainty(Part):
    """Sum over each response of its self-certainty, at each of its tokens, nats."""

    kind: ClassVar[str] = "response_certainty"
    columns: ClassVar[tuple[str, ...]] = ("self_certainty",)

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """The sum of the column over valid tokens."""
        wide = _there(batch.self_certainty).to(accumulator_dtype(batch.mask.device))
        valid = torch.where(batch.mask, wide, 0.0)
        return torch.where(batch.mask, valid.sum(-1, keepdim=True), 0.0)

    def lines(self) -> list[str]:
        """The equation."""
        return ["certainty of the response, sum of KL(uniform || p)"]


ALL: tuple[type[Part], ...] = (
    PredictiveEntropy,
    LossMagnitude,
    LogProb,
    Probability,
    Surprisal,
    RelativeSurprisal,
    Covariance,
    EntropySensitivity,
    SamplerRatio,
    ReferenceDivergence,
    Position,
    PositionSigmoid,
    LogPerplexity,
    ResponseCertainty,
)


def _there(column: Any) -> Tensor:
    """A column that the recipe has asked for, and that the batch therefore has."""
    assert column is not None, "call the recipe, which checks the columns of a batch"
    return column
