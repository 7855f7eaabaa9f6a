"""Is this run collapsing? A verdict at every step, with its reason (Appendix G.3)."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, SupportsFloat, SupportsIndex

from tokenweights._errors import invalid, require_state_keys
from tokenweights._numbers import plain_float, plain_integer
from tokenweights._typing import typed
from tokenweights.diagnostics.failure_modes import (
    Accuracies,
    Episode,
    gradual_degeneration,
    length_instability,
    short_response_collapse,
)
from tokenweights.diagnostics.history import History, Past
from tokenweights.diagnostics.slow_decline import Decline, FailureMode, slow_decline
from tokenweights.diagnostics.thresholds import CollapseThresholds

# Sums of squares of larger numbers may overflow.
LARGEST = 1e100


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
    | `gradual_degeneration` | validation accuracy first improves, later declines | the mean of `evaluations` accuracies is `accuracy_decline` below its best, and twice as deep as any dip that was no alarm |
    | any of them, slowly | | the reward's level, its mean over three windows, is below the best of the last `memory` updates: by `reward_change` if since then length has shrunk to `short_ratio`, or has spiked or grown to `spike_ratio`; by `reward_decline`, which is called `gradual_degeneration`, whatever the length |

    Every comparison also has to pass the run's own noise; see `CollapseThresholds`. A mode holds
    until length, reward or accuracy has recovered. Responses that get shorter while the reward
    grows are healthy, and so are spikes that cost no reward. A reward that falls from one update to
    the next and does not go on falling is a change of the task, unless it ends at
    `lowest_reward`.

    Slow declines are judged once every `window` updates, from the ninth window on. A reward that
    falls to the lowest there is at constant length over 30 to 200 updates is caught a median of 88
    updates after it began to fall, one that falls there at once after 21; a length that goes to a
    twentieth over 300 updates, while the reward falls too, after 108. `benchmarks/diagnostics`
    measures these and all others, and how often healthy runs raise an alarm.

    The monitor is deterministic, remembers `window + horizon` updates and two numbers for each
    window of the last `memory` updates, and never communicates: fed with numbers of the whole
    batch, as from `rollout_statistics`, it says the same on every rank.

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

    @typed
    def __init__(self, thresholds: CollapseThresholds | None = None):
        self.thresholds = CollapseThresholds() if thresholds is None else thresholds
        self._step: int | None = None
        self._history = History()
        self._past = Past()
        self._short: Episode | None = None
        self._spike: Episode | None = None
        self._decline: Decline | None = None
        self._accuracies = Accuracies()

    @typed
    def update(
        self,
        step: SupportsIndex | SupportsFloat,
        *,
        length: SupportsFloat,
        reward: SupportsFloat,
        accuracy: SupportsFloat | None = None,
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
            TokenWeightsError: If the step is not whole or does not increase, a number is not finite
                or beyond 1e100, a length is negative, or an accuracy lies outside [0, 1].
        """
        now = self._next(step)
        length, reward = _number("length", length), _number("reward", reward)
        accuracy = None if accuracy is None else _number("accuracy", accuracy)
        self._step = now
        limits, history, past = self.thresholds, self._history, self._past
        history.append(length, reward, limit=limits.window + limits.horizon)
        self._spike, spike = length_instability(self._spike, history, past, now, limits)
        self._short, short = short_response_collapse(self._short, history, now, limits)
        if past.append(now, history, limits):
            self._decline = slow_decline(self._decline, past, now, limits)
        worse = gradual_degeneration(self._accuracies, accuracy, now, limits)
        found: list[tuple[int, FailureMode, str]] = []
        if self._short is not None and self._short.raised is not None:
            found.append((self._short.raised, "short_response_collapse", short))
        if self._spike is not None and self._spike.raised is not None:
            found.append((self._spike.raised, "length_instability", spike))
        if self._accuracies.raised is not None:
            found.append((self._accuracies.raised, "gradual_degeneration", worse))
        if self._decline is not None:
            reason = self._decline.reason(past)
            found.append((self._decline.raised, self._decline.mode, reason))
        if not found:
            return CollapseVerdict(now)
        since, mode, reason = min(found, key=lambda failure: failure[0])
        return CollapseVerdict(now, mode, since, reason)

    @typed
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later, but for the thresholds.

        Returns:
            Plain numbers, strings, lists and dicts.
        """
        state = {name: getattr(self, f"_{name}") for name in _PARTS}
        return {"step": self._step} | {
            name: None if part is None else asdict(part) for name, part in state.items()
        }

    @typed
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a saved monitor stopped.

        Args:
            state: From `state_dict`.

        Raises:
            TokenWeightsError: If the keys are others.
        """
        require_state_keys("CollapseMonitor", state, self.state_dict())
        for name, kind in _PARTS.items():
            if state[name] is not None:
                keys = kind.__dataclass_fields__
                require_state_keys(f"CollapseMonitor, {name}", state[name], keys)
        self._step = state["step"]
        for name, kind in _PARTS.items():
            # A copy: the saved state must not change when the run goes on.
            part = copy.deepcopy(state[name])
            setattr(self, f"_{name}", None if part is None else kind(**part))

    def _next(self, step: SupportsIndex | SupportsFloat) -> int:
        hint = "Call once for each step; after a resume, load the saved state."
        now = plain_integer("CollapseMonitor.update", "step", step, hint=hint)
        if self._step is not None and now <= self._step:
            raise invalid(
                "CollapseMonitor.update", "step", f"> {self._step}, the one before", now, hint
            )
        return now


_PARTS: dict[str, Any] = {
    "history": History,
    "past": Past,
    "short": Episode,
    "spike": Episode,
    "decline": Decline,
    "accuracies": Accuracies,
}


def _number(name: str, value: SupportsFloat) -> float:
    function, hint = "CollapseMonitor.update", "Leave a step without responses out."
    number = plain_float(function, name, value, limit=LARGEST, hint=hint)
    if name == "length" and number < 0:
        raise invalid(function, name, ">= 0", number, hint)
    if name == "accuracy" and not 0 <= number <= 1:
        raise invalid(function, name, "in [0, 1]", number, "Pass a share, not per cent.")
    return number
