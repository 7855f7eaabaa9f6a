"""The three failure modes of G.3, each a small state machine over the recent past of a run.

An *episode* begins with what comes first in the paper's words (responses shrink, or spike), is
raised by what follows (the reward stalls or falls), and ends when the run has recovered.
"""

import math
import statistics
from dataclasses import dataclass, field

from tokenweights.diagnostics.history import History, Past, reward_change
from tokenweights.diagnostics.levels import jump_noise, level_noise, mean_step_noise, step_noise
from tokenweights.diagnostics.thresholds import CollapseThresholds


@dataclass
class Episode:
    """Something has happened, and may turn out to be a failure.

    Attributes:
        since: Step at which it began.
        age: Updates since then.
        length: Log of the length before.
        reward: Mean reward before.
        drop: Change of the reward that matters, noise considered.
        raised: Step at which it became a failure; None until then.
    """

    since: int
    length: float
    reward: float
    drop: float
    age: int = 0
    raised: int | None = None


def last_long(lengths: list[float], level: float, window: int) -> int:
    """Number of updates before responses fell below a level for good."""
    for end in range(len(lengths), window, -1):
        if statistics.median(lengths[end - window : end]) >= level:
            return end - window // 2  # where half of a window is shorter, its middle is the edge
    return window // 2 + 1


def short_response_collapse(
    episode: Episode | None, history: History, step: int, limits: CollapseThresholds
) -> tuple[Episode | None, str]:
    """Length has shrunk rapidly, and then the reward falls or does not grow."""
    window = limits.window
    if len(history.lengths) < window:
        return None, ""
    # Medians, since the end of a spike is not a shrinking.
    length = statistics.median(history.lengths[-window:])
    reward = sum(history.rewards[-window:]) / window
    least = math.log(limits.recovery_ratio)
    if episode is None:
        level = statistics.median(history.lengths)
        shrunk = level - length
        if shrunk < -math.log(limits.short_ratio):
            return None, ""
        if shrunk < limits.deviations * step_noise(history.lengths) * math.sqrt(math.pi / window):
            return None, ""
        before = last_long(history.lengths, level + least, window)
        rewards = history.rewards[max(before - window, 0) : before]
        drop = reward_change(history.rewards, limits)
        episode = Episode(step, level, sum(rewards) / len(rewards), drop)
    else:
        episode.age += 1
    gain = reward - episode.reward
    waited = episode.age >= limits.patience
    grown = gain >= limits.reward_change * limits.reward_range or reward >= limits.saturated_reward
    if (waited and grown) or length >= episode.length + least:
        history.keep(limits.window)  # later lengths are compared with the present one
        return None, ""
    if episode.raised is None:
        if gain > -episode.drop and not waited:
            return episode, ""
        episode.raised = step
    return episode, (
        f"median length went from {math.exp(episode.length):.0f} to {math.exp(length):.0f} tokens, "
        f"and the mean reward from {episode.reward:.3g} to {reward:.3g}"
    )


def length_instability(
    episode: Episode | None, history: History, past: Past, step: int, limits: CollapseThresholds
) -> tuple[Episode | None, str]:
    """A step's length has spiked, and then the reward falls."""
    window = limits.window
    if len(history.lengths) <= window:
        return episode, ""
    before = sum(history.lengths[-window - 1 : -1]) / window
    jump = history.lengths[-1] - before
    if jump >= math.log(limits.spike_ratio) and (
        jump >= limits.deviations * jump_noise(history.lengths[:-1], window)
    ):
        if episode is None:
            reward = sum(history.rewards[-window - 1 : -1]) / window
            # Noise that outlasts a step, too: a reward that wanders falls without any spike.
            error = level_noise(past.rewards, 1)
            drop = max(reward_change(history.rewards[:-1], limits), limits.deviations / 2 * error)
            episode = Episode(step, before, reward, drop)
        episode.age = 0
        past.spiked = step
    elif episode is not None:
        episode.age += 1
    if episode is None:
        return None, ""
    reward = sum(history.rewards[-window:]) / window
    fallen = episode.reward - reward
    if episode.raised is None:
        if episode.age > limits.follow:
            return None, ""
        if fallen < episode.drop:
            return episode, ""
        episode.raised = step
    elif fallen <= episode.drop / 2:
        return None, ""
    return episode, (
        f"length spiked at step {episode.since} from {math.exp(episode.length):.0f} tokens, "
        f"and the mean reward went from {episode.reward:.3g} to {reward:.3g}"
    )


@dataclass
class Accuracies:
    """Evaluations of a run.

    Attributes:
        values: The last of them, oldest first.
        count: How many there were.
        first: The first; None before it.
        best: Highest mean so far; None before the first mean.
        best_step: Its step.
        depth: How far means have lain below the best since they last came back to it.
        dip: The deepest that they have come back from without an alarm.
        raised: Step at which a decline was raised; None where there is none.
    """

    values: list[float] = field(default_factory=list)
    count: int = 0
    first: float | None = None
    best: float | None = None
    best_step: int | None = None
    depth: float = 0.0
    dip: float = 0.0
    raised: int | None = None


def gradual_degeneration(
    seen: Accuracies, accuracy: float | None, step: int, limits: CollapseThresholds
) -> str:
    """Validation accuracy has improved, and then declines."""
    if accuracy is not None:
        seen.values.append(accuracy)
        seen.count += 1
        seen.first = accuracy if seen.first is None else seen.first
        del seen.values[: -limits.horizon]
    elif seen.raised is None:
        return ""
    window = limits.evaluations
    if seen.count < window:
        return ""
    now = sum(seen.values[-window:]) / window
    if seen.best is None or now > seen.best:
        seen.best, seen.best_step = now, step
    decline = seen.best - now
    # The error is raised by one part in as many as there are means without common evaluations.
    error = mean_step_noise(seen.values) * math.sqrt(2 / window) * (1 + window / len(seen.values))
    least = max(limits.accuracy_decline, limits.deviations * error, 2 * seen.dip)
    if decline <= seen.depth / 2:
        if seen.raised is None:
            seen.dip = max(seen.dip, seen.depth)
        seen.depth = 0.0
    seen.depth = max(seen.depth, decline)
    if seen.raised is not None and decline <= least / 2:
        seen.raised = None
    if seen.raised is None and seen.count >= 3 * window and decline >= least:
        seen.raised = step
    if seen.raised is None:
        return ""
    return (
        f"mean accuracy went from {seen.best:.3f} at step {seen.best_step} to {now:.3f}; "
        f"it had started at {seen.first:.3f}"
    )
