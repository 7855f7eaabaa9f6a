"""What a collapse monitor remembers: the last updates one by one, and the past window by window."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenweights.diagnostics.levels import abrupt_fall, step_noise
from tokenweights.diagnostics.thresholds import CollapseThresholds

# Windows of a level: enough to outlast the noise of a step, few enough to see a fall in time.
LEVEL = 3


@dataclass
class History:
    """Log lengths and rewards of the last updates, oldest first."""

    lengths: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def append(self, length: float, reward: float, *, limit: int) -> None:
        """Adds an update, and forgets all but the last `limit`."""
        self.lengths.append(math.log(max(length, 1.0)))
        self.rewards.append(reward)
        self.keep(limit)

    def keep(self, limit: int) -> None:
        """Forgets all but the last `limit` updates."""
        del self.lengths[:-limit], self.rewards[:-limit]


@dataclass
class Past:
    """A run at the resolution of one length and one reward for each window, oldest first.

    Attributes:
        steps: Last step of each window.
        lengths: Its median log length.
        rewards: Its mean reward.
        moved: Mean rewards without abrupt falls, of the windows before the recent ones. Such a fall
            may be a change of the task, such as the next stage of a curriculum, rather than a
            decline of the policy: what came before is lowered by it.
        recent: Rewards of the last updates, in the same way.
        spiked: Step of the last spike in length; None before the first.
    """

    steps: list[int] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    spiked: int | None = None

    def append(self, step: int, history: History, limits: CollapseThresholds) -> bool:
        """Takes in the last update of the history; True if it completes a window."""
        window = limits.window
        self.recent.append(history.rewards[-1])
        if len(self.recent) % window:
            return False
        self.steps.append(step)
        self.lengths.append(statistics.median(history.lengths[-window:]))
        self.rewards.append(sum(history.rewards[-window:]) / window)
        if len(self.recent) > LEVEL * window:
            self.moved.append(sum(self.recent[:window]) / window)
            del self.recent[:window]
        surplus = len(self.steps) - limits.memory // window
        if surplus > 0:
            for values in (self.steps, self.lengths, self.rewards, self.moved):
                del values[:surplus]
        self._move_along(limits)
        return True

    def without_falls(self, window: int) -> list[float]:
        """Mean reward of each complete window, as if no abrupt fall had been."""
        starts = range(0, len(self.recent) - window + 1, window)
        return self.moved + [sum(self.recent[i : i + window]) / window for i in starts]

    def _move_along(self, limits: CollapseThresholds) -> None:
        fall, place = abrupt_fall(self.recent, limits.window)
        error = step_noise(self.recent) * math.sqrt(2 / limits.window)
        share = limits.reward_change * limits.reward_range
        if fall >= max(share, limits.deviations / 2 * error):
            self.moved = [reward - fall for reward in self.moved]
            self.recent[:place] = [reward - fall for reward in self.recent[:place]]


def reward_change(rewards: Sequence[float], limits: CollapseThresholds) -> float:
    """The change of a window's mean reward that is neither small nor noise from step to step."""
    error = step_noise(rewards) * math.sqrt(2 / limits.window)
    return max(limits.reward_change * limits.reward_range, limits.deviations * error)
