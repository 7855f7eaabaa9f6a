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
    lowest = limits.lowest_reward + limits.reward_change * limits.reward_range
    nothing_left = past.rewards[-1] < lowest
    rewards = past.rewards if nothing_left else past.without_falls(limits.window)
    return _decline(past.rewards, limits.reward_change, past, step, limits, by_length=True) or (
        _decline(rewards, limits.reward_decline, past, step, limits, by_length=False)
    )


def _decline(
    rewards: list[float],
    share: float,
    past: Past,
    step: int,
    limits: CollapseThresholds,
    *,
    by_length: bool,
) -> Decline | None:
    means = levels(rewards, LEVEL)
    best = max(range(len(means)), key=means.__getitem__)
    fall, end = means[best] - means[-1], best + LEVEL - 1
    drop = share * limits.reward_range
    if fall < drop:
        return None
    mode = _mode_of_length(past, best, limits) if by_length else "gradual_degeneration"
    # Noise does not bring a reward down to the lowest there is.
    if rewards is not past.rewards or by_length:
        drop = max(drop, limits.deviations * level_noise(rewards, LEVEL))
    if mode is None or fall < drop:
        return None
    length, reward = levels(past.lengths, LEVEL)[best], levels(past.rewards, LEVEL)[best]
    return Decline(mode, step, past.steps[end], length, reward, drop)


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
