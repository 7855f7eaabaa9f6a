"""When a run counts as collapsing: every number of it."""

import math
from dataclasses import dataclass, fields

from tokenweights._errors import invalid


@dataclass(frozen=True)
class CollapseThresholds:
    """The numbers behind the verdicts of `CollapseMonitor`.

    The paper describes its three failure modes in words and prints no criterion (G.3), so every
    value is ours. Each was chosen so that synthetic runs of each mode are caught, and thousands of
    healthy ones are not. A *mean* or *median* below is one over `window` updates.

    A difference has to pass two bars: the threshold named here, and `deviations` standard errors
    of the run's own step-to-step noise. Small, noisy batches thus make the monitor slower, not
    nervous.

    Attributes:
        window: Updates that make up "now".
        horizon: Updates before now with which it is compared; "rapidly" means within them.
        deviations: Standard errors below which a difference is noise.
        reward_range: Largest minus smallest reward of a response; 3 for the paper's −2, −1, 1.
        reward_change: Share of that range by which a mean reward has to change to have fallen, or
            to have grown.
        saturated_reward: Mean reward that counts as solved; from there on it need not grow.
        short_ratio: Share of its median over the horizon to which length has to shrink.
        patience: Updates that a reward has to grow in after the responses have shrunk.
        recovery_ratio: Share of that earlier median at which a shrunken length has recovered.
        spike_ratio: A step's length over the mean before it, from which on it is a spike.
        follow: Updates after a spike in which a falling reward is put down to it.
        memory: Updates in which the best level of the reward is looked for; a decline that takes
            longer is not seen.
        reward_decline: Share of the reward's range by which its level has to fall below its best
            where length says nothing.
        lowest_reward: Smallest reward of a response. A reward that falls close to it, within
            `reward_change`, has collapsed however abruptly; -infinity if there is none.
        evaluations: Evaluations that make up a mean accuracy.
        accuracy_decline: How far a mean accuracy has to fall below its best.

    Example:
        >>> CollapseThresholds(reward_range=1.0).short_ratio
        0.5
    """

    window: int = 10
    horizon: int = 50
    deviations: float = 5.0
    reward_range: float = 3.0
    reward_change: float = 0.1
    saturated_reward: float = math.inf
    short_ratio: float = 0.5
    patience: int = 25
    recovery_ratio: float = 0.75
    spike_ratio: float = 1.5
    follow: int = 30
    memory: int = 600
    reward_decline: float = 1 / 3
    lowest_reward: float = -2.0
    evaluations: int = 5
    accuracy_decline: float = 0.05

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, int) and not isinstance(value, int):
                raise _refused(field.name, "to be a whole number", value)
            signed = field.name in ("saturated_reward", "lowest_reward")
            if math.isnan(value) or (value <= 0 and not signed):
                raise _refused(field.name, "> 0", value)
        if self.window < 2:
            raise _refused("window", ">= 2", self.window)
        if self.horizon < max(self.window, self.evaluations):
            raise _refused("horizon", ">= `window` and `evaluations`", self.horizon)
        if self.memory < 9 * self.window:
            raise _refused("memory", ">= 9 * `window`", self.memory)
        if not self.short_ratio < self.recovery_ratio <= 1:
            raise _refused("recovery_ratio", "in (`short_ratio`, 1]", self.recovery_ratio)
        if self.spike_ratio <= 1:
            raise _refused("spike_ratio", "> 1", self.spike_ratio)


def _refused(name: str, condition: str, value: float) -> Exception:
    default = CollapseThresholds.__dataclass_fields__[name].default
    return invalid("CollapseThresholds", name, condition, value, f"The default is {default}.")
