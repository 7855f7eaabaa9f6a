import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokenweights as tw
from tokenweights import TokenWeightsError

series = st.lists(st.floats(-1, 1), min_size=1, max_size=30)


def over(values):
    dispersion = tw.OnlineDispersion()
    for value in values:
        dispersion.update(value)
    return dispersion


def close(dispersion, values):
    assert dispersion.count == len(values)
    assert dispersion.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert dispersion.std == pytest.approx(np.std(values), abs=1e-12)
    assert dispersion.cv == pytest.approx(np.std(values) / (abs(np.mean(values)) + 1e-8), rel=1e-6)


@given(series)
def test_agrees_with_numpy(values):
    close(over(values), values)


@given(series, series)
def test_merged_series_are_one_series(first, second):
    merged = over(first)
    merged.merge(over(second))
    assert merged.std == pytest.approx(np.std(first + second), abs=1e-12)
    assert merged.mean == pytest.approx(np.mean(first + second), abs=1e-12)
    merged.merge(tw.OnlineDispersion())
    assert merged.count == len(first + second)


@given(series, series)
def test_a_saved_series_goes_on_bitwise(first, second):
    resumed = tw.OnlineDispersion()
    resumed.load_state_dict(json.loads(json.dumps(over(first).state_dict())))
    for value in second:
        resumed.update(value)
    assert resumed.state_dict() == over(first + second).state_dict()


def test_a_large_offset_does_not_cancel():
    values = [1e9 + value for value in (1.0, 2.0, 3.0)]
    assert over(values).std == pytest.approx(math.sqrt(2 / 3), rel=1e-6)


def test_nothing_yet_is_nan_and_nonsense_is_refused():
    empty = tw.OnlineDispersion()
    empty.merge(tw.OnlineDispersion())
    assert math.isnan(empty.std) and math.isnan(empty.cv)
    zero = tw.OnlineDispersion(epsilon=0.0)
    zero.update(0.0)
    assert zero.cv == math.inf
    for value in (math.nan, math.inf):
        with pytest.raises(TokenWeightsError, match="finite"):
            empty.update(value)
    with pytest.raises(TokenWeightsError, match="keys"):
        empty.load_state_dict({"count": 1})
    with pytest.raises(TokenWeightsError, match="epsilon"):
        tw.OnlineDispersion(epsilon=-1.0)
