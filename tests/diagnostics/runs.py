"""Synthetic runs: series of length, reward and accuracy, healthy or failing in one of three ways.

Every run is drawn anew from its seed: level, trend, batch noise and slow drift (autocorrelated
noise) of each series. A failing run is a healthy one until its onset.
"""

import math
from dataclasses import dataclass

import numpy as np

STEPS = 400
EVALUATE_EVERY = 10


@dataclass
class Run:
    """Trends and noises of a run, and the step from which it fails."""

    log_length: np.ndarray
    reward: np.ndarray
    accuracy: np.ndarray
    noise: np.ndarray  # of log length, reward and accuracy
    onset: int = STEPS

    def updates(self):
        lengths = np.maximum(np.exp(self.log_length + self.noise[0]), 1).tolist()
        rewards = (self.reward + self.noise[1]).tolist()
        accuracies = np.clip(self.accuracy + self.noise[2], 0, 1).tolist()
        for step in range(STEPS):
            evaluated = step % EVALUATE_EVERY == EVALUATE_EVERY - 1
            yield (
                step,
                {
                    "length": lengths[step],
                    "reward": rewards[step],
                    "accuracy": accuracies[step] if evaluated else None,
                },
            )


def wander(generator, *, batch, drift):
    """Independent batch noise plus a slow drift, an autoregressive series of order one."""
    memory = generator.uniform(0.5, 0.95)
    shocks = generator.normal(size=STEPS) * math.sqrt(1 - memory**2)
    slow = np.zeros(STEPS)
    for step in range(1, STEPS):
        slow[step] = memory * slow[step - 1] + shocks[step]
    return batch * generator.normal(size=STEPS) + drift * slow


def rising(generator, low, high, time):
    """From about `low` to about `high`, in a curve or a wave front."""
    center, width = generator.uniform(0, STEPS), generator.uniform(15, 80)
    curve = 1 - np.exp(-time / generator.uniform(40, 250))
    front = 1 / (1 + np.exp(-(time - center) / width))
    return low + (high - low) * (curve if generator.random() < 0.5 else front)


def healthy(seed):
    """Reward and accuracy rise; length grows up to threefold, or shrinks by up to a third.

    One run in five sheds half to four fifths of its length in tens of steps while its reward
    rises, and one in five has spikes of length that cost no reward. Noise runs from large batches
    (2 % of the length, 0.03 of the reward) to small ones (10 %, 0.2), with drifts of up to 6 %
    and 0.08.
    """
    generator = np.random.default_rng(seed)
    time = np.arange(STEPS)
    growth = np.log(generator.uniform(0.65, 3))
    log_length = np.log(generator.uniform(50, 3000)) + rising(generator, 0, growth, time)
    start = generator.uniform(-1.8, -0.3)
    reward = rising(generator, start, generator.uniform(start + 0.3, 0.9), time)
    start = generator.uniform(0.2, 0.4)
    accuracy = rising(generator, start, generator.uniform(start + 0.05, 0.9), time)
    noise = np.stack(
        [
            wander(generator, batch=generator.uniform(*batch), drift=generator.uniform(0, drift))
            for batch, drift in (((0.02, 0.1), 0.06), ((0.03, 0.2), 0.08), ((0.003, 0.02), 0.005))
        ]
    )
    kind = generator.random()
    if kind < 0.2:
        fading = np.exp(-np.maximum(time - generator.uniform(0, 200), 0) / generator.uniform(5, 30))
        log_length += np.log(generator.uniform(0.2, 0.5)) * (1 - fading)
        reward = reward - 1 + generator.uniform(0.7, 1.5) * (1 - fading)
    elif kind < 0.4:
        spikes = generator.random(STEPS) < generator.uniform(0.005, 0.05)
        log_length += spikes * np.log(generator.uniform(1.5, 3, STEPS))
    return Run(log_length, reward, accuracy, noise)


def failing(seed, earliest, latest):
    """A healthy run without shedding or spikes, its onset, and the steps since then."""
    generator = np.random.default_rng([1, seed])
    run = healthy(next(s for s in range(seed * 100, seed * 100 + 100) if is_plain(s)))
    run.onset = int(generator.integers(earliest, latest))
    return run, generator, np.maximum(np.arange(STEPS) - run.onset, 0)


def is_plain(seed):
    plain = healthy(seed)
    return np.abs(np.diff(plain.log_length)).max() < 0.02


def short_responses(seed, *, stalls):
    """Length shrinks to a few per cent in some tens of steps; the reward falls, or stalls."""
    run, generator, after = failing(seed, 20, 100)
    fading = np.exp(-after / generator.uniform(4, 20))
    run.log_length += np.log(generator.uniform(0.02, 0.15)) * (1 - fading)
    if stalls:
        run.reward[run.onset :] = run.reward[run.onset]
    else:
        run.reward -= generator.uniform(0.6, 1.5) * (1 - fading)
    return run


def spiking_lengths(seed):
    """Spikes of two to five times the length, one to three steps each; then the reward falls."""
    run, generator, after = failing(seed, 20, 250)
    step = run.onset
    while step < STEPS:
        width = int(generator.integers(1, 4))
        run.log_length[step : step + width] += np.log(generator.uniform(2, 5))
        step += width + int(generator.integers(3, 25))
    fall = np.clip((after - generator.integers(0, 10)) / generator.uniform(5, 40), 0, 1)
    run.reward[run.onset :] = run.reward[run.onset]
    run.reward -= generator.uniform(0.6, 1.5) * fall
    return run


def degenerating(seed):
    """Accuracy rises until the onset and then falls by 0.001 to 0.003 a step."""
    run, generator, after = failing(seed, 80, 200)
    run.accuracy[run.onset :] = run.accuracy[run.onset]
    run.accuracy -= generator.uniform(0.001, 0.003) * after
    return run


def autoregressive(generator, deviation, memory):
    """Autoregressive noise of order one, stationary from its first step."""
    values = generator.normal(size=STEPS)
    for step in range(1, STEPS):
        values[step] = memory * values[step - 1] + math.sqrt(1 - memory**2) * values[step]
    return deviation * values


def flat(generator):
    """A run that neither learns nor fails, with the noise of `healthy`."""
    noise = np.stack(
        [
            wander(generator, batch=generator.uniform(*batch), drift=generator.uniform(0, drift))
            for batch, drift in (((0.02, 0.1), 0.06), ((0.03, 0.2), 0.08), ((0.003, 0.02), 0.0))
        ]
    )
    level = np.zeros(STEPS)
    reward = level + generator.uniform(-0.8, 0.5)
    return Run(level + np.log(generator.uniform(100, 2000)), reward, level + 0.4, noise)


def wandering(seed):
    """Length wanders by up to 15 %, reward by up to 0.15, with a memory of up to 0.95 a step."""
    generator = np.random.default_rng([2, seed])
    run, memory = flat(generator), generator.uniform(0.5, 0.95)
    for series in run.noise[:2]:
        series[:] = autoregressive(generator, generator.uniform(0.02, 0.15), memory)
    return run


def flat_evaluations(seed):
    """Accuracy is the share of 20 to 200 questions answered right, at the same level throughout."""
    generator = np.random.default_rng([3, seed])
    run, questions = flat(generator), int(generator.choice([20, 30, 50, 100, 200]))
    right = generator.binomial(questions, generator.uniform(0.02, 0.6), STEPS)
    run.accuracy, run.noise[2] = right / questions, 0.0
    return run


def periodic_evaluations(seed):
    """Accuracy swings by up to 0.04 either way, once in 2 to 8 evaluations."""
    generator = np.random.default_rng([4, seed])
    run, period = flat(generator), EVALUATE_EVERY * generator.uniform(2, 8)
    phase = 2 * np.pi * (np.arange(STEPS) / period + generator.random())
    run.accuracy += generator.uniform(0.01, 0.04) * np.sin(phase)
    run.noise[2] = 0.01 * generator.normal(size=STEPS)
    return run


def curriculum(seed):
    """The task gets harder one to three times, at least 30 steps apart.

    Each time reward falls by 0.3 to 1 at once, not below -1.2, length grows by up to a tenth, and
    then the reward comes back, in part or in whole.
    """
    generator = np.random.default_rng([5, seed])
    run, time = flat(generator), np.arange(STEPS)
    stages = generator.choice(np.arange(40, 380, 40), generator.integers(1, 4), replace=False)
    for start in stages + generator.integers(0, 10, len(stages)):
        after = np.maximum(time - start, 0)
        learned = generator.uniform(0, 1) * (1 - np.exp(-after / generator.uniform(30, 150)))
        run.reward -= (time >= start) * generator.uniform(0.3, 1) * (1 - learned)
        run.log_length += (time >= start) * generator.uniform(0, math.log(1.1))
    run.reward = np.maximum(run.reward, -1.2)
    return run


HEALTHY = {
    "learning": healthy,
    "wandering": wandering,
    "flat evaluations": flat_evaluations,
    "periodic evaluations": periodic_evaluations,
    "curriculum": curriculum,
}


def slowly_failing(seed, earliest=60, latest=100):
    """A flat run with a high reward, its onset, and the steps since then."""
    generator = np.random.default_rng([6, seed])
    run = flat(generator)
    run.reward[:] = generator.uniform(-0.5, 0.3)
    run.onset = int(generator.integers(earliest, latest))
    return run, generator, np.maximum(np.arange(STEPS) - run.onset, 0)


def slow_shrinking(seed):
    """Length goes to a twentieth, and reward to -1.2, over 300 steps."""
    run, _, after = slowly_failing(seed)
    done = np.minimum(after / 300, 1)
    run.log_length -= math.log(20) * done
    run.reward += (-1.2 - run.reward) * done
    return run


def slow_forgetting(seed):
    """Reward goes to -2, the lowest there is, over 30 to 200 steps; length stays."""
    run, generator, after = slowly_failing(seed)
    run.reward += (-2 - run.reward) * np.minimum(after / generator.uniform(30, 200), 1)
    return run


def abrupt_forgetting(seed):
    """Reward goes to -2 from one step to the next; length stays."""
    run, _, after = slowly_failing(seed)
    run.reward[after > 0] = -2
    return run


def ramping_length(seed):
    """Length grows 3.3 times over 40 steps; from half of them on, reward falls by 0.6 to 1.5."""
    run, generator, after = slowly_failing(seed)
    run.log_length += math.log(3.3) * np.minimum(after / 40, 1)
    fall = np.clip((after - 20) / generator.uniform(20, 60), 0, 1)
    run.reward -= generator.uniform(0.6, 1.5) * fall
    return run


def spike_then_decline(seed):
    """One spike of two to five times the length; reward falls by 0.6 to 1.5 over 100 steps."""
    run, generator, after = slowly_failing(seed)
    width = int(generator.integers(1, 4))
    run.log_length[run.onset : run.onset + width] += np.log(generator.uniform(2, 5))
    run.reward -= generator.uniform(0.6, 1.5) * np.minimum(after / 100, 1)
    return run


# The mode that a run fails by, and how it is drawn.
SLOW = {
    "slow shrinking": ("short_response_collapse", slow_shrinking),
    "slow forgetting": ("gradual_degeneration", slow_forgetting),
    "abrupt forgetting": ("gradual_degeneration", abrupt_forgetting),
    "ramping length": ("length_instability", ramping_length),
    "spike, then decline": ("length_instability", spike_then_decline),
}
