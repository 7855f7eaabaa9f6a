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

    def reason(self, past: Past, limits: CollapseThresholds) -> str:
        """The numbers behind it."""
        length, reward = (levels(values, LEVEL)[-1] for values in past.windows(limits.window))
        return (
            f"since step {self.since} the mean reward went from {self.reward:.3g} to {reward:.3g}, "
            f"and length from {math.exp(self.length):.0f} to {math.exp(length):.0f} tokens"
        )


def slow_decline(
    decline: Decline | None, past: Past, step: int, limits: CollapseThresholds
) -> Decline | None:
    """The reward lies below its best level; what length did since then names the mode."""
    window_lengths, window_rewards = past.windows(limits.window)
    if len(window_rewards) < 3 * LEVEL:
        return None
    lengths, rewards = levels(window_lengths, LEVEL), levels(window_rewards, LEVEL)
    if decline is not None:
        return None if decline.reward - rewards[-1] <= decline.drop / 2 else decline
    best = max(range(len(rewards)), key=rewards.__getitem__)
    fall, end = rewards[best] - rewards[-1], best + LEVEL - 1
    if fall < min(limits.reward_change, limits.reward_decline) * limits.reward_range:
        return None
    shrunk = lengths[best] - lengths[-1] >= max(
        -math.log(limits.short_ratio), limits.deviations * level_noise(window_lengths, LEVEL)
    )
    grown = max(window_lengths[end:]) - lengths[best] >= max(
        math.log(limits.spike_ratio), limits.deviations * level_noise(window_lengths, 1)
    )
    spiked = past.spiked is not None and past.spiked > past.steps[end]
    mode, share = (
        ("short_response_collapse", limits.reward_change)
        if shrunk
        else ("length_instability", limits.reward_change)
        if grown or spiked
        else ("gradual_degeneration", limits.reward_decline)
    )
    drop = share * limits.reward_range
    if not past.nothing_left(limits):
        drop = max(drop, limits.deviations * level_noise(window_rewards, LEVEL))
    if fall < drop:
        return None
    return Decline(mode, step, past.steps[end], lengths[best], rewards[best], drop)
