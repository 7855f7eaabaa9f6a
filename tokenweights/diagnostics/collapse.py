"""Is this run collapsing? A verdict at every step, with its reason (Appendix G.3)."""

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tokenweights._errors import invalid, require_state_keys
from tokenweights.diagnostics.failure_modes import (
    Accuracies,
    Episode,
    History,
    gradual_degeneration,
    length_instability,
    short_response_collapse,
)
from tokenweights.diagnostics.thresholds import CollapseThresholds

FailureMode = Literal["short_response_collapse", "length_instability", "gradual_degeneration"]


@dataclass(frozen=True)
class CollapseVerdict:
    """What a `CollapseMonitor` says about a step.

    Attributes:
        step: The training step.
        mode: The failure mode that holds now, the one raised first if there are several; None for
            a healthy run.
        since: Step at which it was raised; None for a healthy run.
        reason: The numbers behind it; empty for a healthy run.
    """

    step: int
    mode: FailureMode | None = None
    since: int | None = None
    reason: str = ""

    @property
    def collapsed(self) -> bool:
        """Whether a failure mode holds now."""
        return self.mode is not None


class CollapseMonitor:
    """Watches mean length, mean reward and accuracy of a run for the failure modes of G.3.

    | mode | the paper's words | raised when |
    |---|---|---|
    | `short_response_collapse` | length rapidly shrinks and reward growth stalls | the median length is at most `short_ratio` of that over the `horizon` before, and the mean reward has fallen by `reward_change`, or has not grown by it `patience` updates later |
    | `length_instability` | sudden spikes in length followed by reward degradation | a step is `spike_ratio` times as long as the mean before it, and within `follow` updates the mean reward falls by `reward_change` |
    | `gradual_degeneration` | validation accuracy first improves, later declines | the mean of `evaluations` accuracies is `accuracy_decline` below its best |

    Every comparison also has to pass the run's own noise; see `CollapseThresholds`. A mode holds
    until length, reward or accuracy has recovered. Responses that get shorter while the reward
    grows are healthy, and so are spikes that cost no reward.

    The monitor is deterministic, remembers `window + horizon` updates, and never communicates: fed
    with numbers of the whole batch, as from `rollout_statistics`, it says the same on every rank.

    Args:
        thresholds: When a run counts as collapsing.

    Example:
        >>> monitor = CollapseMonitor()
        >>> for step in range(60):
        ...     shrinking = step >= 40
        ...     verdict = monitor.update(
        ...         step, length=40.0 if shrinking else 400.0, reward=-1.0 if shrinking else 0.0
        ...     )
        >>> verdict.mode, verdict.since
        ('short_response_collapse', 44)
        >>> verdict.reason
        'median length went from 400 to 40 tokens, and the mean reward from 0 to -1'
    """  # noqa: E501

    def __init__(self, thresholds: CollapseThresholds | None = None):
        self.thresholds = CollapseThresholds() if thresholds is None else thresholds
        self._step: int | None = None
        self._history = History()
        self._short: Episode | None = None
        self._spike: Episode | None = None
        self._accuracies = Accuracies()

    def update(
        self, step: int, *, length: float, reward: float, accuracy: float | None = None
    ) -> CollapseVerdict:
        """Takes in one step and judges the run.

        Args:
            step: Training step, larger than the one before. Windows count updates, so call at
                every step, or at regular intervals.
            length: Mean response length of the whole rollout batch, in tokens.
            reward: Its mean reward.
            accuracy: Validation accuracy, in [0, 1], at the steps that have one. Without any,
                `gradual_degeneration` is never raised.

        Returns:
            The verdict.

        Raises:
            TokenWeightsError: If the step does not increase, or a number is not finite or, for a
                length, negative.
        """
        self._check(step, length, reward, accuracy)
        self._step = step
        limits, history = self.thresholds, self._history
        history.append(length, reward, limit=limits.window + limits.horizon)
        self._spike, spike = length_instability(self._spike, history, step, limits)
        self._short, short = short_response_collapse(self._short, history, step, limits)
        decline = gradual_degeneration(self._accuracies, accuracy, step, limits)
        found: list[tuple[int, FailureMode, str]] = []
        if self._short is not None and self._short.raised is not None:
            found.append((self._short.raised, "short_response_collapse", short))
        if self._spike is not None and self._spike.raised is not None:
            found.append((self._spike.raised, "length_instability", spike))
        if self._accuracies.raised is not None:
            found.append((self._accuracies.raised, "gradual_degeneration", decline))
        if not found:
            return CollapseVerdict(step)
        since, mode, reason = min(found, key=lambda failure: failure[0])
        return CollapseVerdict(step, mode, since, reason)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later, but for the thresholds.

        Returns:
            Plain numbers, lists and dicts.
        """
        return {
            "step": self._step,
            "history": asdict(self._history),
            "short": None if self._short is None else asdict(self._short),
            "spike": None if self._spike is None else asdict(self._spike),
            "accuracies": asdict(self._accuracies),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a saved monitor stopped.

        Args:
            state: From `state_dict`.

        Raises:
            TokenWeightsError: If the keys are others.
        """
        require_state_keys("CollapseMonitor", state, self.state_dict())
        # A copy: the saved state must not change when the run goes on.
        state = copy.deepcopy(dict(state))
        self._step = state["step"]
        self._history = History(**state["history"])
        self._short = None if state["short"] is None else Episode(**state["short"])
        self._spike = None if state["spike"] is None else Episode(**state["spike"])
        self._accuracies = Accuracies(**state["accuracies"])

    def _check(self, step: int, length: float, reward: float, accuracy: float | None) -> None:
        if self._step is not None and step <= self._step:
            raise invalid(
                "CollapseMonitor.update", "step", f"> {self._step}, the one before", step,
                "Call once for each step; after a resume, load the saved state.",
            )  # fmt: skip
        for name, value, low in (
            ("length", length, 0.0),
            ("reward", reward, -math.inf),
            ("accuracy", accuracy, -math.inf),
        ):
            if value is not None and not (math.isfinite(value) and value >= low):
                raise invalid(
                    "CollapseMonitor.update", name, "finite" + " and >= 0" * (low == 0), value,
                    "Leave a step without responses out.",
                )  # fmt: skip
