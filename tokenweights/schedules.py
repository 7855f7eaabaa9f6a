"""Schedules: closures from the training step to a number, or to a pair of endpoint weights.

A schedule has no state. It gives the same value for the same step, so it survives checkpoint and
resume as soon as the step does. The exception is `adaptive_progress`, which reacts to the run.
"""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, SupportsFloat, SupportsIndex, TypeVar

from tokenweights._errors import invalid, require_state_keys
from tokenweights._numbers import plain_integer
from tokenweights._typing import typed

Schedule = Callable[[int], float]
Value = TypeVar("Value")

# A whole number: a Python or NumPy integer, a tensor of one, a float like 3.0.
Step = SupportsIndex | SupportsFloat

# Weights are float32.
MAX_WEIGHT = 1e30


@dataclass(frozen=True)
class Endpoints:
    """Weights of the lowest-scored and of the highest-scored token (Eq. 28).

    Attributes:
        low: Weight of the token with the smallest score, >= 0.
        high: Weight of the token with the largest score, >= 0.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _require_weights("Endpoints", low=self.low, high=self.high)


EndpointSchedule = Callable[[int], Endpoints]


@typed
def constant_schedule(value: float) -> Schedule:
    """A schedule that gives the same value at every step.

    Args:
        value: The value.

    Returns:
        `step -> value`.

    Raises:
        TokenWeightsError: If the value is not finite, or later a step negative.

    Example:
        >>> constant_schedule(0.5)(100)
        0.5
    """
    _finite("constant_schedule", value=value)

    def schedule(step: int) -> float:
        _checked(step)
        return value

    return schedule


@typed
def linear_schedule(init_value: float, end_value: float, transition_steps: int) -> Schedule:
    r"""A straight line from `init_value` at step 0 to `end_value` at `transition_steps`, then flat.

    This is Eq. 29 and Eq. 30: $v(s) = v_0 + r_s (v_1 - v_0)$ with $r_s = \min(s / S, 1)$.

    Args:
        init_value: Value at step 0.
        end_value: Value from `transition_steps` on.
        transition_steps: Length of the line; 0 gives `end_value` at once.

    Returns:
        `step -> value`.

    Raises:
        TokenWeightsError: If a value is not finite, or `transition_steps` or later a step negative.

    Example:
        >>> schedule = linear_schedule(1.0, 0.0, 4)
        >>> [schedule(step) for step in (0, 1, 4, 9)]
        [1.0, 0.75, 0.0, 0.0]
    """
    _finite("linear_schedule", init_value=init_value, end_value=end_value)
    _require_steps("linear_schedule", transition_steps=transition_steps)
    return _line(init_value, end_value, transition_steps)


@typed
def cosine_schedule(init_value: float, end_value: float, transition_steps: int) -> Schedule:
    r"""Half a cosine from `init_value` at step 0 to `end_value` at `transition_steps`, then flat.

    $v(s) = v_0 + \tfrac{1}{2} (1 - \cos \pi r_s) (v_1 - v_0)$ with $r_s = \min(s / S, 1)$.

    Args:
        init_value: Value at step 0.
        end_value: Value from `transition_steps` on.
        transition_steps: Length of the transition; 0 gives `end_value` at once.

    Returns:
        `step -> value`.

    Raises:
        TokenWeightsError: If a value is not finite, or `transition_steps` or later a step negative.

    Example:
        >>> schedule = cosine_schedule(1.0, 0.0, 4)
        >>> [round(schedule(step), 3) for step in (0, 1, 2, 4, 9)]
        [1.0, 0.854, 0.5, 0.0, 0.0]
    """
    _finite("cosine_schedule", init_value=init_value, end_value=end_value)
    _require_steps("cosine_schedule", transition_steps=transition_steps)
    progress = _progress(transition_steps)
    return lambda step: _between(
        init_value, end_value, (1 - math.cos(math.pi * progress(step))) / 2
    )


@typed
def piecewise_schedule(values: Sequence[float], boundaries: Sequence[int]) -> Schedule:
    """A staircase: `values[0]` before the first boundary, `values[i]` from boundary `i - 1` on.

    Args:
        values: One value more than there are boundaries.
        boundaries: Steps at which the value changes, strictly increasing.

    Returns:
        `step -> value`.

    Raises:
        TokenWeightsError: If the lengths do not fit, a value is not finite or the boundaries do not
            increase.

    Example:
        >>> schedule = piecewise_schedule([1.0, 0.5, 0.0], [10, 20])
        >>> [schedule(step) for step in (0, 9, 10, 20)]
        [1.0, 1.0, 0.5, 0.0]
    """
    if len(values) != len(boundaries) + 1:
        raise invalid(
            "piecewise_schedule",
            "values",
            f"of length {len(boundaries) + 1}, one more than `boundaries`",
            f"length {len(values)}",
            "Give the value before the first boundary too.",
        )
    for value in values:
        _finite("piecewise_schedule", values=value)
    if any(b <= a for a, b in zip([0, *boundaries], boundaries, strict=False)):
        raise invalid(
            "piecewise_schedule",
            "boundaries",
            "positive and strictly increasing",
            list(boundaries),
            "Sort them and drop duplicates.",
        )
    steps, stairs = tuple(boundaries), tuple(values)  # what was checked, whatever becomes of it
    return lambda step: stairs[bisect.bisect_right(steps, _checked(step))]


@typed
def endpoint_schedule(low: Schedule, high: Schedule) -> EndpointSchedule:
    """Two schedules joined into one of endpoint weights.

    Args:
        low: Weight of the lowest-scored token over the steps.
        high: Weight of the highest-scored token over the steps.

    Returns:
        `step -> Endpoints`.

    Example:
        >>> endpoint_schedule(constant_schedule(1.0), linear_schedule(0.0, 1.0, 10))(5)
        Endpoints(low=1.0, high=0.5)
    """
    return lambda step: Endpoints(low(step), high(step))


@typed
def low_to_high(warmup_steps: int) -> EndpointSchedule:
    """The paper's Low2High: weight moves from low-scored to high-scored tokens (Eq. 29, 30).

    Args:
        warmup_steps: Steps from `Endpoints(1, 0)` to `Endpoints(0, 1)`. The paper's text does
            not give its value.

    Returns:
        `step -> Endpoints`.

    Raises:
        TokenWeightsError: If `warmup_steps` or later a step is negative.

    Example:
        >>> low_to_high(100)(25)
        Endpoints(low=0.75, high=0.25)
    """
    _require_steps("low_to_high", warmup_steps=warmup_steps)
    return endpoint_schedule(_line(1.0, 0.0, warmup_steps), _line(0.0, 1.0, warmup_steps))


@typed
def high_to_low(warmup_steps: int) -> EndpointSchedule:
    """The reverse of `low_to_high`: weight moves from high-scored to low-scored tokens.

    Args:
        warmup_steps: Steps from `Endpoints(0, 1)` to `Endpoints(1, 0)`.

    Returns:
        `step -> Endpoints`.

    Raises:
        TokenWeightsError: If `warmup_steps` or later a step is negative.

    Example:
        >>> high_to_low(100)(25)
        Endpoints(low=0.25, high=0.75)
    """
    _require_steps("high_to_low", warmup_steps=warmup_steps)
    return endpoint_schedule(_line(0.0, 1.0, warmup_steps), _line(1.0, 0.0, warmup_steps))


@typed
def static_endpoints(low: float, high: float) -> EndpointSchedule:
    """The same endpoint weights at every step.

    Args:
        low: Weight of the lowest-scored token, >= 0.
        high: Weight of the highest-scored token, >= 0.

    Returns:
        `step -> Endpoints`.

    Raises:
        TokenWeightsError: If a weight is no `Endpoints` has, or later a step negative.

    Example:
        >>> static_endpoints(1.0, 0.0)(12345)
        Endpoints(low=1.0, high=0.0)
    """
    _require_weights("static_endpoints", low=low, high=high)
    return endpoint_schedule(constant_schedule(low), constant_schedule(high))


class AdaptiveProgress(Generic[Value]):
    """A schedule that reads a clock, and the clock stands or runs back while a run is in trouble.

    Without trouble the clock shows the step, so the schedule is the one it was made from, exactly.
    Made by `adaptive_progress`.

    Args:
        schedule: Any schedule.
        rollback: Ticks that the clock runs back per step in trouble; 0 makes it stand.
    """

    @typed
    def __init__(self, schedule: Callable[[int], Value], *, rollback: int = 0):
        if rollback < 0:
            raise invalid("adaptive_progress", "rollback", ">= 0", rollback, "0 pauses the clock.")
        self.schedule = schedule
        self.rollback = rollback
        self._step, self._clock, self._troubled = 0, 0, False

    @typed
    def __call__(self, step: Step) -> Value:
        """The schedule's value at the clock of a step."""
        return self.schedule(self.clock(step))

    @typed
    def clock(self, step: Step) -> int:
        """What the clock shows at a step, as far as is known: what a recipe takes as its step.

        Args:
            step: Training step, not before the last one that was judged.

        Returns:
            Healthy steps so far, less those rolled back; >= 0.

        Raises:
            TokenWeightsError: If the step is not whole, or lies before the last one judged.
        """
        step = _whole("adaptive_progress", step)
        if step < self._step:
            raise invalid(
                "adaptive_progress", "step", f">= {self._step}, the last one judged", step,
                "To go back in time, load the state of that time.",
            )  # fmt: skip
        elapsed = step - self._step
        return (
            max(self._clock - self.rollback * elapsed, 0)
            if self._troubled
            else (self._clock + elapsed)
        )

    @typed
    def update(self, step: Step, *, troubled: bool) -> None:
        """Takes in the verdict on a step, which holds for the steps after it until the next.

        Args:
            step: The step that was judged; of several verdicts on one step the last counts.
            troubled: Whether the run is in trouble, such as a collapse monitor's
                `verdict.collapsed`. Has to be the same on every rank.

        Raises:
            TokenWeightsError: If the step is not whole, or lies before the last one judged.
        """
        self._clock = self.clock(step)
        self._step, self._troubled = _whole("adaptive_progress", step), troubled

    @typed
    def state_dict(self) -> dict[str, int]:
        """Everything needed to go on later, but for the schedule.

        Returns:
            Plain numbers.
        """
        return {"step": self._step, "clock": self._clock, "troubled": int(self._troubled)}

    @typed
    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on where a saved schedule stopped.

        Args:
            state: From `state_dict`.

        Raises:
            TokenWeightsError: If the keys are others.
        """
        require_state_keys("adaptive_progress", state, self.state_dict())
        self._step, self._clock = int(state["step"]), int(state["clock"])
        self._troubled = bool(state["troubled"])


@typed
def adaptive_progress(
    schedule: Callable[[int], Value], *, rollback: int = 0
) -> AdaptiveProgress[Value]:
    """A schedule that pauses, or rolls back, while a run is in trouble.

    The paper leaves open whether allocation can react to collapse indicators (Section 7,
    Limitations); this is one way, and its default is ours. Low2High, for one, goes back towards
    anchors while responses collapse, and forward again once they have recovered.

    Args:
        schedule: Any schedule, of numbers or of endpoint weights.
        rollback: Ticks that the clock runs back per step in trouble; 0 pauses it.

    Returns:
        A schedule with the methods `update`, `clock`, `state_dict` and `load_state_dict`.

    Raises:
        TokenWeightsError: If `rollback` is negative.

    Example:
        >>> schedule = adaptive_progress(low_to_high(10), rollback=2)
        >>> for step, troubled in enumerate([False, False, False, True, True, False]):
        ...     print(step, schedule(step).high)
        ...     schedule.update(step, troubled=troubled)
        0 0.0
        1 0.1
        2 0.2
        3 0.3
        4 0.1
        5 0.0
    """
    return AdaptiveProgress(schedule, rollback=rollback)


def _whole(function: str, step: Step) -> int:
    return plain_integer(function, "step", step, hint="Count training steps.")


def _checked(step: Step) -> int:
    step = _whole("schedule", step)
    if step < 0:
        raise invalid("schedule", "step", ">= 0", step, "Count training steps from 0.")
    return step


def _finite(function: str, **values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise invalid(function, name, "finite", value, "Pass the value to run to.")


def _require_weights(function: str, **weights: float) -> None:
    for name, weight in weights.items():
        if not 0 <= weight <= MAX_WEIGHT:
            raise invalid(
                function,
                name,
                "in [0, 1e30], since the sign of the advantage picks the clip side",
                weight,
                "To drop tokens, give them weight 0.",
            )


def _require_steps(function: str, **counts: int) -> None:
    for name, count in counts.items():
        if count < 0:
            raise invalid(function, name, ">= 0", count, "Pass 0 for the end value.")


def _line(start: float, end: float, steps: int) -> Schedule:
    progress = _progress(steps)
    return lambda step: _between(start, end, progress(step))


def _progress(transition_steps: int) -> Schedule:
    def progress(step: int) -> float:
        step = _checked(step)
        return 1.0 if transition_steps == 0 else min(step / transition_steps, 1.0)

    return progress


def _between(start: float, end: float, progress: float) -> float:
    return (1 - progress) * start + progress * end
