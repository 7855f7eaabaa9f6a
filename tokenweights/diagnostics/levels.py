"""Levels of a noisy series and how far they wander: what a decline is measured with.

A *level* is the mean of some consecutive values. Noise is what a level does that is not a trend:
from one value to the next, and from one level to those before and after it.
"""

import itertools
import math
import statistics
from collections.abc import Sequence


def levels(values: Sequence[float], width: int) -> list[float]:
    """Means of every `width` consecutive values, oldest first; none if there are fewer."""
    count = len(values) - width + 1
    return [sum(values[start : start + width]) / width for start in range(count)]


def step_noise(values: Sequence[float]) -> float:
    """Standard deviation of independent noise, blind to slow trends and to single jumps.

    From the median size of the differences.
    """
    sizes = [abs(later - earlier) for earlier, later in itertools.pairwise(values)]
    return 1.4826 * statistics.median(sizes) / math.sqrt(2) if sizes else 0.0


def mean_step_noise(values: Sequence[float]) -> float:
    """As `step_noise`, from the mean size: for values half of which may equal the one before."""
    sizes = [abs(later - earlier) for earlier, later in itertools.pairwise(values)]
    return math.sqrt(math.pi) / 2 * sum(sizes) / len(sizes) if sizes else 0.0


def jump_noise(values: Sequence[float], width: int) -> float:
    """Standard deviation of a value's distance from the level just before it."""
    pairs = zip(values[width:], levels(values, width), strict=False)
    sizes = [abs(value - before) for value, before in pairs]
    return math.sqrt(math.pi / 2) * sum(sizes) / len(sizes) if sizes else 0.0


def level_noise(values: Sequence[float], width: int) -> float:
    """Standard error of a difference of two levels about their trend, even of noise with a memory.

    From the median size of the levels' bends, the distance of a level from the middle of the levels
    just before and just after it. A straight line, however steep, has none; noise that is slow
    enough to outlast a level has, which single differences do not see. Few bends say little, so one
    part is added in as many as there are bends without common values.

    Returns:
        In the unit of the values; 0 for fewer than `3 * width` values, which have no bend.
    """
    means = levels(values, width)
    bends = [
        abs(middle - (before + after) / 2)
        for before, middle, after in zip(means, means[width:], means[2 * width :], strict=False)
    ]
    if not bends:
        return 0.0
    # A bend of independent levels has 3/2 of the variance of one, and a difference has 4/2.
    size = 1.4826 * math.sqrt(4 / 3) * statistics.median(bends)
    return size * (1 + width / len(bends))


def abrupt_fall(values: Sequence[float], width: int) -> tuple[float, int]:
    """How far a series falls from one value to the next, where it does not slide.

    Of all adjacent stretches of `width` values, those that lie furthest apart: is a step between
    them nearer to the values than a straight line through both?

    Returns:
        The size of the fall, 0 where there is none, and the place of the first value after it.
    """
    means = levels(values, width)
    if len(means) <= width:
        return 0.0, 0
    falls = [before - after for before, after in zip(means, means[width:], strict=False)]
    fall = max(falls)
    start = falls.index(fall)
    offsets = [place + 0.5 - width for place in range(2 * width)]
    slope = sum(a * b for a, b in zip(offsets, values[start : start + 2 * width], strict=True))
    # Both sides are what the model takes off the sum of squares.
    by_step, by_line = fall**2 * width / 2, slope**2 / sum(offset**2 for offset in offsets)
    return (fall, start + width) if fall > 0 and by_step > by_line else (0.0, 0)
