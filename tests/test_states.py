"""Every class that can be saved and resumed: plain JSON, whatever kind of number was fed."""

import inspect
import json
import math

import numpy as np
import pytest
import torch

import tokenweights as tw
from tokenweights import TokenWeightsError


def fed_monitor(number, whole):
    monitor = tw.CollapseMonitor()
    for step in range(130):
        length = 100.0 if step != 60 else 300.0
        reward = 0.0 if step < 62 else -1.5
        accuracy = number(0.5) if step % 5 == 0 else None
        monitor.update(whole(step), length=number(length), reward=number(reward), accuracy=accuracy)
    return monitor


def fed_dispersion(number, whole):
    dispersion = tw.OnlineDispersion()
    for value in (0.5, 0.25, -0.125):
        dispersion.update(number(value))
    return dispersion


def fed_series(number, whole):
    series = tw.GradientSeries()
    for subset, dispersion in series.cosines.items():
        dispersion.update(number(0.5 if subset == "anchor" else 0.25))
    return series


def fed_clock(number, whole):
    schedule = tw.adaptive_progress(tw.low_to_high(10), rollback=1)
    for step in range(5):
        schedule.update(whole(step), troubled=step == 3)
    return schedule


# How each stateful class is fed, and a new one like it made.
STATEFUL = {
    tw.CollapseMonitor: (fed_monitor, tw.CollapseMonitor),
    tw.OnlineDispersion: (fed_dispersion, tw.OnlineDispersion),
    tw.GradientSeries: (fed_series, tw.GradientSeries),
    tw.AdaptiveProgress: (
        fed_clock,
        lambda: tw.adaptive_progress(tw.low_to_high(10), rollback=1),
    ),
}
NUMBERS = {
    "python": (float, int),
    "whole floats": (float, float),
    "numpy": (np.float64, np.int64),
    "narrow numpy": (np.float32, np.int32),
    "tensors": (torch.tensor, torch.tensor),
    "half tensors of one": (
        lambda value: torch.tensor([value], dtype=torch.float16),
        lambda value: torch.tensor([value]),
    ),
}


def public_classes():
    found = {value for value in vars(tw).values() if inspect.isclass(value)}
    return {kind for kind in found if hasattr(kind, "state_dict")}


def leaves(state):
    if isinstance(state, dict):
        assert all(type(key) is str for key in state)
        return [leaf for value in state.values() for leaf in leaves(value)]
    if isinstance(state, list):
        return [leaf for value in state for leaf in leaves(value)]
    return [state]


def test_every_stateful_class_is_listed():
    assert public_classes() == set(STATEFUL)


@pytest.mark.parametrize("kind", STATEFUL, ids=lambda kind: kind.__name__)
def test_public_methods_are_typed(kind):
    methods = [
        method
        for name, method in vars(kind).items()
        if inspect.isfunction(method) and (name in ("__init__", "__call__") or name[0] != "_")
    ]
    assert len(methods) >= 3
    untyped = [m.__qualname__ for m in methods if not hasattr(m, "__wrapped__")]
    if kind is tw.GradientSeries:
        untyped.remove("GradientSeries.__init__")  # takes nothing
    assert not untyped


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("kind", STATEFUL, ids=lambda kind: kind.__name__)
def test_states_are_plain_json_whatever_was_fed(kind, numbers):
    feed, new = STATEFUL[kind]
    state = feed(*NUMBERS[numbers]).state_dict()
    assert {type(leaf) for leaf in leaves(state)} <= {int, float, str, type(None)}
    assert state == feed(float, int).state_dict()
    text = json.dumps(state, allow_nan=False)
    resumed = new()
    resumed.load_state_dict(json.loads(text))
    assert json.dumps(resumed.state_dict()) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200, torch.ones(2), torch.tensor(1 + 2j)])
@pytest.mark.parametrize("name", ["length", "reward", "accuracy", "dispersion"])
def test_what_a_state_cannot_hold_is_refused(name, value):
    monitor, dispersion = tw.CollapseMonitor(), tw.OnlineDispersion()
    before = monitor.state_dict(), dispersion.state_dict()
    with pytest.raises(TokenWeightsError, match=r"expected `(value|length|reward|accuracy)`"):
        if name == "dispersion":
            dispersion.update(value)
        else:
            monitor.update(0, **({"length": 1.0, "reward": 0.0} | {name: value}))
    assert (monitor.state_dict(), dispersion.state_dict()) == before


@pytest.mark.parametrize("step", [1.5, math.nan, torch.tensor(0.5), torch.arange(2)])
def test_a_step_is_one_whole_number(step):
    schedule = tw.adaptive_progress(tw.low_to_high(10))
    for call in (
        lambda: tw.CollapseMonitor().update(step, length=1.0, reward=0.0),
        lambda: schedule.update(step, troubled=False),
        lambda: schedule.clock(step),
        lambda: tw.low_to_high(10)(step),
    ):
        with pytest.raises(TokenWeightsError, match="expected `step` a whole number"):
            call()


def test_a_part_of_a_state_with_other_keys_is_refused():
    state = tw.CollapseMonitor().state_dict()
    with pytest.raises(TokenWeightsError, match="history"):
        tw.CollapseMonitor().load_state_dict(state | {"history": {"lengths": []}})
