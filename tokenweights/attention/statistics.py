"""What can be measured on one attention distribution, and the record that holds the answers."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor

from tokenweights.attention.received import Received

EntropyKind = Literal["raw", "normalized", "topk", "fixed"]
Heads = Literal["mean_distribution", "mean_entropy", "none"]
StatisticKind = Literal[
    "raw",
    "normalized",
    "topk",
    "fixed",
    "support_size",
    "mean_distance",
    "local_mass",
    "nonlocal_mass",
    "max_weight",
    "row_mass",
]

ENTROPY_KINDS: tuple[EntropyKind, ...] = get_args(EntropyKind)
STATISTIC_KINDS: tuple[StatisticKind, ...] = get_args(StatisticKind)

SOFTCAPS = (1e-15, 1e18)


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of the attention distribution of every query; None where not asked for.

    With `heads="none"` every field has a head axis after the batch axis. A query at a padded
    position has value 0 everywhere.

    Attributes:
        raw: Entropy in nats (Eq. 12).
        normalized: Entropy over the logarithm of the number of visible keys, in [0, 1] (Eq. 13).
        topk: Entropy in nats of the k largest weights, renormalized (Eq. 14).
        fixed: Entropy in nats of the first K visible keys, renormalized (Eq. 15).
        support_size: For each mass, the least number of keys whose weights sum to it.
        mean_distance: Mean distance from query to key, in real tokens.
        local_mass: Share of the visible mass on keys nearer than the local window.
        nonlocal_mass: The remaining share.
        max_weight: Largest weight.
        row_mass: Sum of the weights before renormalization: 1 up to rounding, less with sinks.
        received: What each key receives, see `attention_received`; with a `batch key` shape.
    """

    raw: Float[Tensor, "batch *heads query"] | None = None
    normalized: Float[Tensor, "batch *heads query"] | None = None
    topk: Float[Tensor, "batch *heads query"] | None = None
    fixed: Float[Tensor, "batch *heads query"] | None = None
    support_size: Int[Tensor, "batch *heads query mass"] | None = None
    mean_distance: Float[Tensor, "batch *heads query"] | None = None
    local_mass: Float[Tensor, "batch *heads query"] | None = None
    nonlocal_mass: Float[Tensor, "batch *heads query"] | None = None
    max_weight: Float[Tensor, "batch *heads query"] | None = None
    row_mass: Float[Tensor, "batch *heads query"] | None = None
    received: Float[Tensor, "batch *heads key"] | None = None


@dataclass(frozen=True)
class Request:
    """Which statistics one sweep computes, with their parameters."""

    kinds: tuple[StatisticKind, ...]
    top_k: int = 256
    fixed_k: int = 256
    support_mass: tuple[float, ...] = ()
    local_window: int = 128
    distance_bound: int | None = None
    received: Received | None = None

    def only(self, *kinds: StatisticKind) -> "Request":
        """The same parameters with other statistics."""
        return dataclasses.replace(self, kinds=kinds)

    def bounded(self, keys: int) -> "Request":
        """The same request of rows of `keys` keys, in counts that fit any integer type."""
        counts = {
            name: min(getattr(self, name), max(keys, 1))
            for name in ("top_k", "fixed_k", "local_window")
        }
        bound, received = self.distance_bound, self.received
        return dataclasses.replace(
            self,
            **counts,
            distance_bound=None if bound is None else min(bound, max(keys, 1)),
            received=None if received is None else received.bounded(keys),
        )


@dataclass(frozen=True)
class Logits:
    """How scores become logits and which keys a query sees.

    `scale` multiplies the inner products; `softcap` then bounds them; `window` counts visible keys
    including the query itself; `causal` hides keys to the right of the query.
    """

    scale: float
    softcap: float | None = None
    causal: bool = True
    window: int | None = None

    def bounded(self, keys: int) -> "Logits":
        """The same logits of rows of `keys` keys, in numbers that fit any type.

        A window stays one, however wide: a packed batch has more keys than its sequences, and both
        have to go the same way. A softcap far above any score is none, and one far below 1 leaves
        equal logits, however far below it is.
        """
        least, most = SOFTCAPS
        window, softcap = self.window, self.softcap
        return dataclasses.replace(
            self,
            scale=float(self.scale),
            window=None if window is None else min(window, max(keys, 1)),
            softcap=None if softcap is None or softcap > most else max(softcap, least),
        )


def layer_logits(
    dim: int, scale: float | None, softcap: float | None, causal: bool, window: int | None
) -> Logits:
    """The logits of a layer whose heads are `dim` wide, as its arguments say."""
    # A width of 0 is refused with the shapes.
    factor = float(max(dim, 1)) ** -0.5 if scale is None else scale
    return Logits(factor, softcap, causal, window)
