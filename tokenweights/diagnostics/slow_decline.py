"""A reward that falls over many updates, and the failure mode of G.3 that it belongs to."""

import math
from dataclasses import dataclass
from typing import Literal

from tokenweights.diagnostics.history import LEVEL, Past
from tokenweights.diagnostics.levels import level_noise, levels
from tokenweights.diagnostics.thresholds import CollapseThresholds

FailureMode = Literal["short_response_collapse", "length_instability", "gradual_degeneration"]


@dataclass
class Decline:
    """The level of the reward has fallen below its best.

    Attributes:
        mode: The failure mode it belongs to.
        raised: Step at which it was raised.
        since: Last step of the best level.
        length: Log length of that level.
        reward: Its mean reward.
        drop: Change of the reward that matters, noise considered.
    """

    mode: FailureMode
    raised: int
    since: int
    length: float
    reward: float
    drop: float

    def reason(self, past: Past) -> str:
        """The numbers behind it."""
        length, reward = levels(past.lengths, LEVEL)[-1], levels(past.rewards, LEVEL)[-1]
        return (
            f"since step {self.since} the mean reward went from {self.reward:.3g} to {reward:.3g}, "
            f"and length from {math.exp(self.length):.0f} to {math.exp(length):.0f} tokens"
        )


def slow_decline(
    decline: Decline | None, past: Past, step: int, limits: CollapseThresholds
) -> Decline | None:
    """The reward lies below its best level; what length did since then names the mode."""
    if len(past.rewards) < 3 * LEVEL:
        return None
    if decline is not None:
        fall = decline.reward - levels(past.rewards, LEVEL)[-1]
        return decline if fall > decline.drop / 2 else None
    best, fall = _best_level(past.rewards)
    drop = _drop(past.rewards, limits.reward_change, limits)
    mode = _mode_of_length(past, best, limits) if fall >= drop else None
    if mode is None:
        mode = "gradual_degeneration"
        if past.rewards[-1] < limits.lowest_reward + limits.reward_change * limits.reward_range:
            # Neither noise nor a new task brings a reward down to the lowest there is.
            drop = limits.reward_decline * limits.reward_range
        else:
            rewards = past.without_falls(limits.window)
            best, fall = _best_level(rewards)
            drop = _drop(rewards, limits.reward_decline, limits)
    if fall < drop:
        return None
    length, reward = levels(past.lengths, LEVEL)[best], levels(past.rewards, LEVEL)[best]
    return Decline(mode, step, past.steps[best + LEVEL - 1], length, reward, drop)


def _best_level(rewards: list[float]) -> tuple[int, float]:
    """First window of the highest level, and how far the last level lies below it."""
    means = levels(rewards, LEVEL)
    best = max(range(len(means)), key=means.__getitem__)
    return best, means[best] - means[-1]


def _drop(rewards: list[float], share: float, limits: CollapseThresholds) -> float:
    """The change of a level that is neither small nor noise."""
    return max(share * limits.reward_range, limits.deviations * level_noise(rewards, LEVEL))


def _mode_of_length(past: Past, best: int, limits: CollapseThresholds) -> FailureMode | None:
    """The failure mode that length tells of since a level of the reward; None if it is none."""
    lengths, end = levels(past.lengths, LEVEL), best + LEVEL - 1
    shrunk = max(
        -math.log(limits.short_ratio), limits.deviations * level_noise(past.lengths, LEVEL)
    )
    if lengths[best] - lengths[-1] >= shrunk:
        return "short_response_collapse"
    grown = max(math.log(limits.spike_ratio), limits.deviations * level_noise(past.lengths, 1))
    # A level outlasts a spike, so the best one may still hold it.
    spiked = past.spiked is not None and past.spiked > past.steps[best]
    if spiked or max(past.lengths[end:]) - lengths[best] >= grown:
        return "length_instability"
    return None
