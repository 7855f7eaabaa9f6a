import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import scored_masks

import tokenweights as tw
from tokenweights import TokenWeightsError


@given(scored_masks(max_token=20), st.integers(0, 1000), st.sampled_from([0.0, 1e6]))
def test_pearson_agrees_with_numpy(case, seed, offset):
    first, mask = case
    noise = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)).double()
    second = torch.where(mask, first + noise, torch.nan)
    got = tw.pearson_correlation(first + offset, second, mask).item()
    a, b = (first + offset)[mask].numpy(), second[mask].numpy()
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        assert math.isnan(got)
    else:
        assert got == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)


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
