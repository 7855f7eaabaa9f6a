"""Standard deviation and coefficient of variation of a series that is never stored (J.2)."""

import math
from collections.abc import Mapping
from typing import SupportsFloat

from tokenweights._errors import invalid, require_state_keys
from tokenweights._numbers import plain_float
from tokenweights._typing import typed


class OnlineDispersion:
    r"""Mean, standard deviation and coefficient of variation of a growing series, in one pass.

    $\mathrm{CV} = \mathrm{std} / (|\mathrm{mean}| + \epsilon)$ of all values so far (appendix J.2),
    with the population's standard deviation, by Welford's recurrence. The paper prints no
    $\epsilon$; the default is ours.

    Attributes:
        count: Number of values so far.
        mean: Their mean; 0 before the first.
        epsilon: Added to the absolute mean in `cv`.

    Example:
        >>> cosines = OnlineDispersion()
        >>> for cosine in (0.5, 0.7, 0.6):
        ...     cosines.update(cosine)
        >>> round(cosines.std, 4), round(cosines.cv, 4)
        (0.0816, 0.1361)
    """

    @typed
    def __init__(self, *, epsilon: float = 1e-8):
        if not 0 <= epsilon < math.inf:
            raise invalid("OnlineDispersion", "epsilon", ">= 0", epsilon, "Try 1e-8.")
        self.epsilon = epsilon
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    @typed
    def update(self, value: SupportsFloat) -> None:
        """Takes in one value.

        Args:
            value: A finite number.

        Raises:
            TokenWeightsError: If it is not finite, or beyond 1e100, whose square may overflow.
        """
        hint = "Leave undefined cosines out."
        value = plain_float("OnlineDispersion", "value", value, limit=1e100, hint=hint)
        self.count += 1
        before = value - self.mean
        self.mean += before / self.count
        self._squares += before * (value - self.mean)

    @typed
    def merge(self, other: "OnlineDispersion") -> None:
        """Takes in all values of another series.

        Args:
            other: A series, which stays as it is.
        """
        count = self.count + other.count
        if count == 0:
            return
        apart = other.mean - self.mean
        self._squares += other._squares + apart**2 * self.count * other.count / count
        self.mean += apart * other.count / count
        self.count = count

    @property
    def std(self) -> float:
        """Standard deviation of the values so far; NaN before the first."""
        return math.sqrt(self._squares / self.count) if self.count else math.nan

    @property
    def cv(self) -> float:
        """Standard deviation in units of the absolute mean; NaN before the first value.

        With a mean of 0 and `epsilon` 0 it is infinite.
        """
        bottom = abs(self.mean) + self.epsilon
        return self.std / bottom if bottom > 0 else math.inf

    @typed
    def state_dict(self) -> dict[str, float]:
        """Everything needed to go on later.

        Returns:
            Plain numbers.
        """
        return {"count": self.count, "mean": self.mean, "sum_of_squares": self._squares}

    @typed
    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Goes on where a saved series stopped.

        Args:
            state: From `state_dict`.

        Raises:
            TokenWeightsError: If the keys are others.
        """
        require_state_keys("OnlineDispersion", state, self.state_dict())
        self.count = int(state["count"])
        self.mean = float(state["mean"])
        self._squares = float(state["sum_of_squares"])
