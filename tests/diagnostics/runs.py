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
