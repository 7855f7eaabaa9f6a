import math

import pytest
import torch
from hypothesis import given
from strategies import scored_masks

import tokenweights as tw
from tokenweights import TokenWeightsError


def test_metrics_by_hand():
    mask = torch.tensor([[True] * 5 + [False], [False] * 6])
    scores = torch.tensor([[0.5, 0.1, 0.2, 0.3, 0.4, math.nan], [math.nan] * 6])
    weights = torch.tensor([[3.0, 1.0, 0.0, 0.0, 0.0, math.nan], [math.nan] * 6])
    assert tw.token_weight_metrics(scores, weights, mask) == pytest.approx(
        {
            "weight_mean": 4 / 5,
            "effective_sample_size": 16 / 10 / 5,
            "anchor_share": 0.25,
            "explorer_share": 0.75,
            "entropy_mean": 0.3,
            "entropy_std": math.sqrt(0.02),
            "anchor_entropy_mean": 0.1,
            "anchor_entropy_std": 0.0,
            "explorer_entropy_mean": 0.5,
            "explorer_entropy_std": 0.0,
        },
        abs=1e-6,
    )


@given(scored_masks())
def test_metrics_are_finite_or_absent(case):
    scores, mask = case
    weights = torch.where(mask, scores, torch.nan)
    metrics = tw.token_weight_metrics(scores, weights, mask)
    assert bool(metrics) == bool(mask.any())
    assert all(math.isfinite(value) for value in metrics.values())
    without = tw.token_weight_metrics(None, weights, mask)
    assert without == {
        key: metrics[key] for key in ("weight_mean", "effective_sample_size")[: len(without)]
    }


def test_uniform_weights_have_full_effective_sample_size():
    metrics = tw.token_weight_metrics(None, torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    assert metrics == {"weight_mean": 1.0, "effective_sample_size": 1.0}


def test_negative_weights_are_refused():
    with pytest.raises(TokenWeightsError, match=">= 0"):
        tw.token_weight_metrics(None, -torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))


def test_nan_weights_are_refused():
    with pytest.raises(TokenWeightsError, match="weights"):
        tw.token_weight_metrics(
            None, torch.full((1, 1), math.nan), torch.ones(1, 1, dtype=torch.bool)
        )
