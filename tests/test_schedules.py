import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokenweights as tw
from tokenweights import Endpoints, TokenWeightsError

SHAPES = [tw.linear_schedule, tw.cosine_schedule]


def test_equations_29_and_30_by_hand():
    schedule = tw.low_to_high(warmup_steps=40)
    assert schedule(0) == Endpoints(1.0, 0.0)
    assert schedule(10) == Endpoints(0.75, 0.25)
    assert schedule(40) == schedule(1000) == Endpoints(0.0, 1.0)
    assert tw.high_to_low(warmup_steps=40)(10) == Endpoints(0.25, 0.75)


def test_cosine_by_hand():
    assert math.isclose(tw.cosine_schedule(2.0, 0.0, 3)(1), 1.5)


@pytest.mark.parametrize("shape", SHAPES)
@given(
    start=st.floats(-10, 10),
    end=st.floats(-10, 10),
    steps=st.integers(0, 50),
    step=st.integers(0, 100),
)
def test_shapes_run_monotonically_from_start_to_end(shape, start, end, steps, step):
    schedule = shape(start, end, steps)
    if steps > 0:
        assert schedule(0) == start
    assert schedule(steps) == pytest.approx(end, abs=1e-12)
    assert schedule(steps + step) == schedule(steps)
    now, later = schedule(step), schedule(step + 1)
    assert (later - now) * (end - start) >= -1e-9


def test_zero_steps_give_the_end_value_at_once():
    assert tw.low_to_high(0)(0) == Endpoints(0.0, 1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tw.linear_schedule(0.0, 1.0, -1),
        lambda: tw.piecewise_schedule([1.0], [3]),
        lambda: tw.piecewise_schedule([1.0, 0.0], [0]),
        lambda: tw.piecewise_schedule([1.0, 0.5, 0.0], [3, 3]),
        lambda: tw.constant_schedule(1.0)(-1),
        lambda: tw.low_to_high(10)(-1),
        lambda: tw.static_endpoints(1.0, 0.0)(-1),
        lambda: Endpoints(-0.1, 1.0),
        lambda: Endpoints(0.0, math.nan),
        lambda: tw.static_endpoints(math.inf, 0.0)(0),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(TokenWeightsError):
        make()
