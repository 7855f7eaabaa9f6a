import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import score_stacks

import tokenweights as tw
from tokenweights import TokenWeightsError


def apart(values):
    """Values moved and scaled to [0, 1], which keeps correlations, and the error that is left.

    Rounding the mean is an error of half a unit in the last place of the largest value.
    """
    spread = np.ptp(values)
    return (values - values.min()) / spread, np.abs(values).max() * 2**-52 / spread


@given(score_stacks(2, max_token=20), st.sampled_from([0.0, 1e6]))
def test_pearson_agrees_with_numpy(case, offset):
    (first, second), mask = case
    got = tw.pearson_correlation(first + offset, second, mask).item()
    a, b = (first + offset)[mask].numpy(), second[mask].numpy()
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        assert math.isnan(got)
        return
    (a, error), (b, other) = apart(a), apart(b)
    if error + other < 1e-9:
        assert got == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
    else:  # a score that is constant but for rounding
        assert math.isnan(got) or abs(got) <= 1


def test_rank_correlation_by_hand():
    # Ranks 0 1 2 against 0 2 1, and 0 1 against 0 1, scaled to [-1/2, 1/2] in each row.
    first = torch.tensor([[0.1, 0.2, 0.3], [5.0, 6.0, math.nan], [7.0, math.nan, math.nan]])
    second = torch.tensor([[1.0, 9.0, 8.0], [0.0, 1.0, math.nan], [7.0, math.nan, math.nan]])
    mask = ~first.isnan()
    expected = (0.25 + 0 + 0 + 0.25 + 0.25) / 1.0
    assert tw.rank_correlation(first, second, mask).item() == pytest.approx(expected)


def test_nothing_to_correlate_is_nan_and_nan_scores_are_refused():
    one = torch.ones(1, 1)
    assert tw.rank_correlation(one, one, one.bool()).isnan()
    assert tw.pearson_correlation(one, one, one.bool()).isnan()
    for correlation in (tw.pearson_correlation, tw.rank_correlation):
        with pytest.raises(TokenWeightsError, match="second"):
            correlation(one, one * math.nan, one.bool())
