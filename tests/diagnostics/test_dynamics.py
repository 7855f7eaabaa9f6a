import math

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import scored_masks

import tokenweights as tw
from tokenweights import TokenWeightsError


@given(scored_masks())
def test_dynamics_agree_with_numpy(case):
    scores, mask = case
    high = mask & (scores > 0.5)
    dynamics = tw.group_dynamics(scores, [mask, high])
    for place, members in enumerate((mask, high)):
        values = scores[members].numpy()
        assert dynamics.count[place] == values.size
        if values.size:
            assert dynamics.mean[place].item() == pytest.approx(values.mean())
            assert dynamics.std[place].item() == pytest.approx(np.std(values), abs=1e-7)
        else:
            assert math.isnan(dynamics.mean[place]) and math.isnan(dynamics.std[place])


def test_a_large_offset_costs_no_digits():
    scores = torch.tensor([[1e8, 1e8 + 8]], dtype=torch.float64)
    assert tw.group_dynamics(scores, [scores > 0]).std.item() == 4.0


def test_no_group_is_refused():
    with pytest.raises(TokenWeightsError, match="groups"):
        tw.group_dynamics(torch.rand(1, 2), [])


def test_nan_inside_a_group_is_refused():
    scores = torch.tensor([[0.0, math.nan]])
    with pytest.raises(TokenWeightsError, match="finite"):
        tw.group_dynamics(scores, [torch.ones(1, 2, dtype=torch.bool)])


def test_heads_keep_an_axis():
    scores = torch.rand(3, 2, 5)
    mask = torch.rand(3, 5) < 0.7
    got = tw.group_dynamics(scores, [mask, mask & False])
    for head in range(2):
        alone = tw.group_dynamics(scores[:, head], [mask, mask & False])
        torch.testing.assert_close(got.mean[:, head], alone.mean, equal_nan=True)
        torch.testing.assert_close(got.std[:, head], alone.std, equal_nan=True)
        assert torch.equal(got.count[:, head], alone.count)
    with pytest.raises(TokenWeightsError, match="finite"):
        tw.group_dynamics(torch.where(mask[:, None], torch.nan, scores), [mask])
