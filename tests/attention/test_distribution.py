import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweights import (
    TokenWeightsError,
    attention_entropy,
    attention_entropy_from_weights,
    attention_weights,
)


@settings(max_examples=40)
@given(
    keys=st.integers(1, 12),
    window=st.none() | st.integers(1, 6),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    padding=st.integers(0, 3),
    data=st.data(),
)
def test_rows_are_the_distribution_whose_entropy_is_measured(
    keys, window, softcap, sinks, padding, data
):
    queries = data.draw(st.integers(1, keys))
    generator = torch.Generator().manual_seed(keys)
    query = torch.randn(2, 4, queries, 8, generator=generator)
    key = torch.randn(2, 2, keys, 8, generator=generator)
    key_mask = torch.ones(2, keys, dtype=torch.bool)
    key_mask[1, : min(padding, keys - queries)] = False
    given = {"window": window, "softcap": softcap, "key_mask": key_mask}
    given["sinks"] = torch.randn(4, generator=generator) if sinks else None

    weights = attention_weights(query, key, **given)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, queries))
    assert not weights[1, :, ~key_mask[1]].any()
    torch.testing.assert_close(
        torch.special.entr(weights).sum(-1),
        attention_entropy(query, key, kind="raw", **given),
        atol=1e-5,
        rtol=1e-5,
    )


def test_softmax_of_one_head_by_hand():
    query, key = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [2.0]]]])
    expected = torch.tensor([0.0, 2.0]).softmax(0)
    torch.testing.assert_close(attention_weights(query, key, scale=1.0)[0, 0], expected)
    weights = attention_weights(query, key, scale=1.0)[:, None]
    torch.testing.assert_close(
        attention_entropy_from_weights(weights, kind="raw"),
        torch.special.entr(expected).sum().view(1, 1),
    )


def test_a_padded_query_has_an_empty_row():
    key_mask = torch.tensor([[False, True]])
    weights = attention_weights(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), key_mask=key_mask)
    assert weights.tolist() == [[[0.0, 0.0], [0.0, 1.0]]]


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(TokenWeightsError, match="attention_weights"):
        attention_weights(torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 2, 4))
