"""Attention entropy as a signal: layers, rows, and how layers become one score."""

import math

import pytest
import torch

from tokenweights import RolloutBatch, TokenWeightsError
from tokenweights.recipes.signals import AttentionEntropy

MASK = torch.tensor([[True, True, True, False]])


def placed(layers, depth, **available):
    return AttentionEntropy(layers=layers).placed(depth, **available).layers


def test_layers_are_numbered():
    assert placed(None, 36) == (20,)
    assert placed((0, -1), 4) == (0, 3)
    assert placed((3, 0, -1), 4) == (3, 0)
    with pytest.raises(TokenWeightsError, match=r"\[0, 1, 2, 3\], got 4"):
        placed((4,), 4)


def test_layers_of_a_hybrid_model():
    assert placed(None, 12, available=(2, 5, 8, 11)) == (5,)
    assert placed((-1, 2), 12, available=(2, 5, 8)) == (8, 2)
    with pytest.raises(TokenWeightsError, match=r"\[2, 5\], got 3"):
        placed((3,), 12, available=(2, 5))


def test_layers_merge_by_mean_or_by_rank():
    one = torch.tensor([[0.1, 0.2, 0.9, math.nan]])
    other = torch.tensor([[0.5, 0.3, 0.7, math.nan]])
    mean = AttentionEntropy().merged([one, other], MASK)
    torch.testing.assert_close(mean[0, :3], torch.tensor([0.3, 0.25, 0.8]))
    ranks = AttentionEntropy(layer_reduction="rank_mean").merged([one, other], MASK)
    assert ranks[0, :3].tolist() == [0.25, 0.25, 1.0]
    with pytest.raises(TokenWeightsError, match="scores"):
        AttentionEntropy().merged([], MASK)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_of_half_precision_are_merged_in_float32(dtype):
    layers, mask = torch.rand(3, 1, 50).to(dtype), torch.ones(1, 50, dtype=torch.bool)
    for chosen in (layers, layers[:1]):
        merged = AttentionEntropy().merged(list(chosen), mask)
        torch.testing.assert_close(merged, chosen.float().mean(0))


def test_alignment_picks_the_row():
    scores = torch.tensor([[1.0, 2.0, 3.0]])
    assert AttentionEntropy().aligned(scores, response_length=2).tolist() == [[1.0, 2.0]]
    own = AttentionEntropy(alignment="own")
    assert own.aligned(scores, response_length=2).tolist() == [[2.0, 3.0]]


def test_a_batch_has_to_hold_the_layers():
    layers = {3: torch.rand(1, 4), 5: torch.rand(1, 4)}
    batch = RolloutBatch(mask=MASK, attention=layers)
    assert torch.equal(AttentionEntropy(layers=(5,))(batch), layers[5])
    with pytest.raises(TokenWeightsError, match=r"with layer 4, got \[3, 5\]"):
        AttentionEntropy(layers=(4,))(batch)
    with pytest.raises(TokenWeightsError, match="of one layer"):
        AttentionEntropy()(batch)
    alone = RolloutBatch(mask=MASK, attention={3: layers[3]})
    assert torch.equal(AttentionEntropy()(alone), layers[3])
