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

    An abrupt fall of the reward is a change of the task, such as the next stage of a curriculum,
    rather than a decline of the policy. The past moves along with it: what came before is lowered
    by the fall, and its length changed as the length did. A fall that leaves hardly any reward is
    none of these.

    Attributes:
        steps: Last step of each window, recent ones included.
        lengths: Median log length of each window before the recent ones.
        rewards: Mean reward of each.
        recent_lengths: Log lengths of the last updates.
        recent_rewards: Their rewards.
        spiked: Step of the last spike in length; None before the first.
    """

    steps: list[int] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    recent_lengths: list[float] = field(default_factory=list)
    recent_rewards: list[float] = field(default_factory=list)
    spiked: int | None = None

    def append(self, step: int, length: float, reward: float, limits: CollapseThresholds) -> bool:
        """Takes in the log length and the reward of an update; True if it completes a window."""
        window = limits.window
        self.recent_lengths.append(length)
        self.recent_rewards.append(reward)
        if len(self.recent_rewards) % window:
            return False
        self.steps.append(step)
        if len(self.recent_rewards) > LEVEL * window:
            self.lengths.append(statistics.median(self.recent_lengths[:window]))
            self.rewards.append(sum(self.recent_rewards[:window]) / window)
            del self.recent_lengths[:window], self.recent_rewards[:window]
        surplus = len(self.steps) - limits.memory // window
        if surplus > 0:
            del self.steps[:surplus], self.lengths[:surplus], self.rewards[:surplus]
        self._move_along(limits)
        return True

    def windows(self, window: int) -> tuple[list[float], list[float]]:
        """Median log length and mean reward of each complete window."""
        starts = range(0, len(self.recent_rewards) - window + 1, window)
        lengths = [statistics.median(self.recent_lengths[i : i + window]) for i in starts]
        rewards = [sum(self.recent_rewards[i : i + window]) / window for i in starts]
        return self.lengths + lengths, self.rewards + rewards

    def nothing_left(self, limits: CollapseThresholds) -> bool:
        """Whether the mean reward of the last window is hardly above the lowest there is."""
        reward = sum(self.recent_rewards[-limits.window :]) / limits.window
        return reward < limits.lowest_reward + limits.reward_change * limits.reward_range

    def _move_along(self, limits: CollapseThresholds) -> None:
        window = limits.window
        fall, place = abrupt_fall(self.recent_rewards, window)
        if fall < reward_change(self.recent_rewards, limits) or self.nothing_left(limits):
            return
        before = statistics.median(self.recent_lengths[place - window : place])
        growth = statistics.median(self.recent_lengths[place : place + window]) - before
        self.lengths = [length + growth for length in self.lengths]
        self.rewards = [reward - fall for reward in self.rewards]
        self.recent_lengths[:place] = [length + growth for length in self.recent_lengths[:place]]
        self.recent_rewards[:place] = [reward - fall for reward in self.recent_rewards[:place]]


def reward_change(rewards: Sequence[float], limits: CollapseThresholds) -> float:
    """The change of a window's mean reward that is neither small nor noise from step to step."""
    error = step_noise(rewards) * math.sqrt(2 / limits.window)
    return max(limits.reward_change * limits.reward_range, limits.deviations * error)
