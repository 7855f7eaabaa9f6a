import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweights import TokenWeightsError
from tokenweights.attention import (
    ENTROPY_KINDS,
    attention_entropy,
    attention_entropy_from_weights,
)


def causal_weights(query, key):
    """Softmax weights with zeros above the diagonal, queries being the last positions."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    queries, keys = scores.shape[-2:]
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def test_known_weights_give_known_entropies():
    weights = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.75, 0.25]]]])
    assert attention_entropy_from_weights(weights).tolist() == [[0.0, 1.0]]
    per_head = attention_entropy_from_weights(weights, kind="raw", heads="none")
    fair = torch.special.entr(torch.tensor([0.25, 0.75])).sum()
    torch.testing.assert_close(per_head, fair * torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 150),
    st.data(),
    st.sampled_from(ENTROPY_KINDS),
    st.sampled_from(["mean_distribution", "mean_entropy", "none"]),
)
def test_weights_of_a_query_and_key_give_their_entropy(keys, data, kind, heads):
    queries = data.draw(st.integers(1, keys))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    query = torch.randn(2, 3, queries, 8, generator=generator)
    key = torch.randn(2, 3, keys, 8, generator=generator)
    arguments = {"kind": kind, "heads": heads, "top_k": 6, "fixed_k": 6}
    weights = causal_weights(query, key)
    torch.testing.assert_close(
        attention_entropy_from_weights(weights, **arguments),
        attention_entropy(query, key, **arguments),
        atol=1e-5,
        rtol=1e-5,
    )


def test_weights_that_are_not_visible_are_never_read():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 7, 8, generator=generator)
    key = torch.randn(1, 2, 7, 8, generator=generator)
    for window in (None, 2):
        expected = attention_entropy(query, key, window=window)
        hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
        if window is not None:
            hidden |= torch.ones(7, 7, dtype=torch.bool).tril(-window)
        padded = torch.full((1, 2, 9, 9), torch.nan)
        weights = causal_weights(query, key).masked_fill(hidden, 0.0)
        weights = weights / weights.sum(-1, keepdim=True)
        padded[:, :, 2:, 2:] = weights.masked_fill(hidden, torch.nan)
        mask = torch.tensor([[False, False, *[True] * 7]])
        entropy = attention_entropy_from_weights(padded, key_mask=mask, window=window)
        torch.testing.assert_close(entropy[:, 2:], expected, atol=1e-5, rtol=1e-5)
        assert not entropy[:, :2].any()


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_weights_that_are_no_distribution_are_refused(bad):
    weights = torch.full((1, 1, 3, 3), 0.5)
    weights[0, 0, 2, 1] = bad
    with pytest.raises(TokenWeightsError, match="expected `weights` to be finite, >= 0"):
        attention_entropy_from_weights(weights)
    with pytest.raises(TokenWeightsError, match="got a negative, non-finite or empty row"):
        attention_entropy_from_weights(torch.zeros(1, 1, 3, 3))


def test_weights_outside_the_first_keys_leave_the_fixed_entropy_undefined():
    weights = torch.eye(3)[None, None]
    assert not attention_entropy_from_weights(weights).any()
    with pytest.raises(TokenWeightsError, match="on the first 2 visible keys"):
        attention_entropy_from_weights(weights, kind="fixed", fixed_k=2)


def test_more_queries_than_keys_are_refused():
    with pytest.raises(TokenWeightsError, match="no longer than `key`"):
        attention_entropy_from_weights(torch.ones(1, 1, 3, 2))
