import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, score_stacks

import tokenweights as tw
from tokenweights import TokenWeightsError


@given(score_stacks(3, dtypes=FLOATS), st.sampled_from([0.2, 0.5]))
def test_agreement_is_that_of_every_pair(case, fraction):
    layers, mask = case
    agreement = tw.layer_agreement(layers, mask, fraction=fraction)
    for i in range(3):
        for j in range(3):
            for subset, got in (
                (tw.bottom_fraction, agreement.anchor_jaccard),
                (tw.top_fraction, agreement.explorer_jaccard),
            ):
                pair = [subset(layers[k], mask, fraction=fraction) for k in (i, j)]
                expected = tw.partition_jaccard(*pair, mask)
                torch.testing.assert_close(got[i, j], expected, equal_nan=True)
            expected = tw.rank_correlation(layers[i], layers[j], mask)
            got = agreement.rank_correlation[i, j]
            torch.testing.assert_close(got, expected, equal_nan=True)


def test_agreement_of_one_response_agrees_with_numpy():
    layers = np.random.default_rng(0).normal(size=(4, 50))
    ranks = layers.argsort(-1).argsort(-1)
    anchors = [set(np.flatnonzero(rank < 10)) for rank in ranks]
    agreement = tw.layer_agreement(torch.tensor(layers)[:, None], torch.ones(1, 50).bool())
    np.testing.assert_allclose(agreement.rank_correlation, np.corrcoef(ranks), atol=1e-12)
    expected = [[len(one & two) / len(one | two) for one in anchors] for two in anchors]
    np.testing.assert_allclose(agreement.anchor_jaccard, expected)


def test_heads_can_stand_for_layers():
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    heads = tw.attention_entropy(query, key, heads="none")
    agreement = tw.layer_agreement(heads.movedim(1, 0), torch.ones(2, 9).bool())
    assert agreement.explorer_jaccard.shape == (4, 4)
    assert (agreement.explorer_jaccard.diagonal() == 1).all()


def test_chunks_of_rows_do_not_show(monkeypatch):
    layers, mask = torch.rand(3, 7, 5), torch.rand(7, 5) < 0.6
    whole = tw.layer_agreement(layers, mask)
    monkeypatch.setattr("tokenweights.masked.CHUNK_TOKENS", 10)
    chunked = tw.layer_agreement(layers, mask)
    torch.testing.assert_close(chunked.rank_correlation, whole.rank_correlation)
    assert torch.equal(chunked.anchors.common, whole.anchors.common)


def test_no_layer_and_nan_scores_are_refused():
    mask = torch.ones(1, 2).bool()
    with pytest.raises(TokenWeightsError, match="of a layer"):
        tw.layer_agreement(torch.rand(0, 1, 2), mask)
    with pytest.raises(TokenWeightsError, match="finite"):
        tw.layer_agreement(torch.full((1, 1, 2), torch.nan), mask)
