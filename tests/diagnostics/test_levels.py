"""What a decline is measured with, worked by hand and against the noise that was put in."""

import math

import numpy as np
import pytest

from tokenweights.diagnostics.levels import (
    abrupt_fall,
    jump_noise,
    level_noise,
    levels,
    mean_step_noise,
    step_noise,
)


def test_by_hand():
    assert levels([1.0, 2.0, 3.0, 6.0], 2) == [1.5, 2.5, 4.5]
    assert levels([1.0], 2) == [] and level_noise([1.0, 2.0], 1) == 0
    # Differences 0, 0, 0, 3: the median is blind to the jump, and the mean is not.
    assert step_noise([1.0, 1.0, 1.0, 1.0, 4.0]) == 0
    assert mean_step_noise([1.0, 1.0, 1.0, 1.0, 4.0]) == pytest.approx(
        0.75 * math.sqrt(math.pi) / 2
    )
    assert jump_noise([1.0, 3.0, 5.0], 2) == pytest.approx(3 * math.sqrt(math.pi / 2))


@pytest.mark.parametrize("width", [1, 3])
def test_a_straight_line_has_no_noise_of_levels(width):
    assert level_noise([0.25 * place for place in range(30)], width) == 0


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("memory, low, high", [(0.0, 0.9, 1.1), (0.5, 0.6, 1.1)])
def test_noise_of_levels_is_the_error_of_a_difference(width, memory, low, high):
    """Against the differences of far levels, whose standard deviation it stands for."""
    generator, values = np.random.default_rng(0), [0.0]
    for _ in range(30_000):
        values.append(memory * values[-1] + float(generator.normal()))
    means = np.array(levels(values, width))
    error = np.std(means[200:] - means[:-200])
    assert low < level_noise(values, width) / error < high


def test_a_step_is_abrupt_and_a_slide_is_not():
    assert abrupt_fall([1.0] * 12 + [0.0] * 8, 5) == (1.0, 12)
    assert abrupt_fall([1.0 - place / 20 for place in range(20)], 5) == (0.0, 0)
    assert abrupt_fall([0.0] * 10 + [1.0] * 10, 5) == (0.0, 0)
    assert abrupt_fall([1.0] * 5, 5) == (0.0, 0)
