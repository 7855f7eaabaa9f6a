import json
import math

import numpy as np
import pytest
import torch
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


@pytest.mark.parametrize("step", [3.0, np.int64(3), torch.tensor(3)])
@pytest.mark.parametrize(
    "schedule",
    [
        tw.constant_schedule(0.5),
        tw.linear_schedule(0.0, 1.0, 7),
        tw.cosine_schedule(0.0, 1.0, 7),
        tw.piecewise_schedule([1.0, 0.5], [3]),
        tw.adaptive_progress(tw.linear_schedule(0.0, 1.0, 7)),
    ],
)
def test_any_whole_number_is_a_step(schedule, step):
    assert type(schedule(step)) is float and schedule(step) == schedule(3)


def test_a_staircase_stays_what_it_was_made_of():
    values, boundaries = [1.0, 0.5, 0.0], [2, 4]
    schedule = tw.piecewise_schedule(values, boundaries)
    values[0], boundaries[0] = math.nan, 100
    values.clear()
    assert [schedule(step) for step in (0, 2, 3, 4)] == [1.0, 0.5, 0.5, 0.0]


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
        lambda: tw.static_endpoints(math.inf, 0.0),
        lambda: tw.static_endpoints(-1.0, 0.0),
        lambda: tw.static_endpoints(0.0, 1e31),
        lambda: tw.linear_schedule(math.inf, 0.0, 10),
        lambda: tw.cosine_schedule(0.0, math.nan, 10),
        lambda: tw.piecewise_schedule([1.0, math.nan], [3]),
        lambda: tw.linear_schedule(0.0, 1.0, 10)(2.5),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(TokenWeightsError):
        make()


@given(st.integers(0, 60), st.integers(0, 3), st.lists(st.booleans(), max_size=60))
def test_the_clock_agrees_with_a_walk(warmup, rollback, verdicts):
    schedule = tw.adaptive_progress(tw.low_to_high(warmup), rollback=rollback)
    clock = 0
    for step, troubled in enumerate(verdicts):
        assert schedule.clock(step) == clock
        assert schedule(step) == tw.low_to_high(warmup)(clock)
        schedule.update(step, troubled=troubled)
        assert schedule.clock(step) == clock  # a step's own value does not change afterwards
        clock = max(clock - rollback, 0) if troubled else clock + 1


@given(st.integers(0, 1000))
def test_without_trouble_the_schedule_is_its_own(step):
    plain, adaptive = tw.low_to_high(100), tw.adaptive_progress(tw.low_to_high(100))
    assert adaptive(step) == plain(step)
    adaptive.update(step, troubled=False)
    assert adaptive(step + 1) == plain(step + 1)


def test_a_pause_lasts_until_the_next_verdict():
    schedule = tw.adaptive_progress(tw.linear_schedule(0.0, 1.0, 10))
    schedule.update(4, troubled=True)
    assert [schedule(step) for step in (4, 5, 9)] == [0.4, 0.4, 0.4]
    schedule.update(9, troubled=False)
    assert schedule(10) == 0.5


def test_a_resumed_clock_goes_on_where_it_stopped():
    first = tw.adaptive_progress(tw.low_to_high(10), rollback=1)
    second = tw.adaptive_progress(tw.low_to_high(10), rollback=1)
    for step, troubled in enumerate([False, False, False, False, True, True]):
        first.update(step, troubled=troubled)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.clock(step) for step in (5, 6, 9)] == [3, 2, 0]
    assert second.state_dict() == first.state_dict()


def test_an_adaptive_clock_refuses_the_past_and_other_states():
    schedule = tw.adaptive_progress(tw.constant_schedule(1.0))
    schedule.update(7, troubled=True)
    for run in (lambda: schedule(6), lambda: schedule.update(6, troubled=False)):
        with pytest.raises(TokenWeightsError, match="the last one judged"):
            run()
    with pytest.raises(TokenWeightsError, match="state_dict"):
        schedule.load_state_dict({"step": 1})
    with pytest.raises(TokenWeightsError, match="rollback"):
        tw.adaptive_progress(tw.constant_schedule(1.0), rollback=-1)
