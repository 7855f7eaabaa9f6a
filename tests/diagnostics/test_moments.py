import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import score_stacks

import tokenweights as tw
from tokenweights import TokenWeightsError


@given(score_stacks(3, max_token=20), st.sampled_from([0.0, 1e6]))
def test_moments_agree_with_numpy(case, offset):
    scores, mask = case
    scores = torch.cat([scores[:1] + offset, scores[1:]])
    moments = tw.score_moments(scores, mask)
    values = scores[:, mask].numpy()
    assert moments.count == values.shape[1]
    if values.shape[1]:
        np.testing.assert_allclose(moments.mean, values.mean(1), rtol=1e-12)
        expected = np.cov(values, bias=True) * values.shape[1]
        np.testing.assert_allclose(moments.products, expected, atol=1e-8)
    if values.shape[1] > 2 and np.ptp(values, axis=1).min() > 1e-3:
        np.testing.assert_allclose(moments.correlation, np.corrcoef(values), atol=1e-6)


@given(st.floats(-1e6, 1e6), st.integers(1, 60))
def test_a_constant_score_has_no_correlation(value, tokens):
    scores = torch.rand(2, 1, tokens, dtype=torch.float64)
    scores[0] = value
    correlation = tw.score_moments(scores, torch.ones(1, tokens).bool()).correlation
    assert correlation[0].isnan().all() and correlation[0, 1].isnan()


def test_chunks_of_rows_do_not_show(monkeypatch):
    scores, mask = torch.rand(2, 7, 5, dtype=torch.float64), torch.rand(7, 5) < 0.6
    whole = tw.score_moments(scores, mask)
    monkeypatch.setattr("tokenweights.masked.CHUNK_TOKENS", 10)
    chunked = tw.score_moments(scores, mask)
    torch.testing.assert_close(chunked.products, whole.products)
    torch.testing.assert_close(chunked.mean, whole.mean)


def test_nan_under_the_mask_is_refused():
    with pytest.raises(TokenWeightsError, match="finite"):
        tw.score_moments(torch.tensor([[[1.0, torch.nan]]]), torch.ones(1, 2).bool())


@pytest.mark.parametrize("scale", [1e-100, 1e-40, 1e40, 1e100])
def test_correlation_does_not_depend_on_the_unit(scale):
    """Squares of squares of such scores leave the range of a float64."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    scores[1] += scores[0]
    mask = torch.ones(3, 5, dtype=torch.bool)
    expected = torch.corrcoef(scores.flatten(1))
    got = tw.score_moments(scores * scale, mask).correlation
    torch.testing.assert_close(got, expected)
