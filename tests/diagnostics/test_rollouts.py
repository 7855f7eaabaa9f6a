import math

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import masks

import tokenweights as tw
from tokenweights import TokenWeightsError


@given(masks())
def test_rollouts_agree_with_numpy(mask):
    counts = mask.any(-1)
    rewards = torch.where(counts, torch.linspace(-2, 1, len(mask), dtype=torch.float64), torch.nan)
    got = tw.rollout_statistics(mask, rewards)
    assert got.responses == counts.sum()
    if counts.any():
        assert got.length == pytest.approx(np.mean(mask.sum(-1)[counts].numpy()))
        assert got.reward == pytest.approx(np.mean(rewards[counts].numpy()))
    else:
        assert math.isnan(got.length) and math.isnan(got.reward)


def test_a_nan_reward_is_refused():
    with pytest.raises(TokenWeightsError, match="rewards"):
        tw.rollout_statistics(torch.ones(1, 1).bool(), torch.tensor([math.nan]))


def test_whole_rewards_are_rewards():
    mask, rewards = torch.ones(3, 2, dtype=torch.bool), torch.tensor([1, -1, -2])
    assert tw.rollout_statistics(mask, rewards) == tw.rollout_statistics(mask, rewards.double())
