import jaxtyping
import pytest
import torch
from attention import bad_input

from tokenweights import TokenWeightsError
from tokenweights.attention import (
    attention_entropy,
    attention_entropy_varlen,
    attention_statistics,
)
from tokenweights.attention.received import Received

QUERY, KEY = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "`attention_entropy`: expected `window` to be >= 1, got 0."),
        ({"window": 2, "causal": False}, "expected `window` to be None when causal=False, got 2."),
        ({"softcap": 0.0}, "expected `softcap` to be > 0, got 0.0."),
        ({"softcap": float("nan")}, "expected `softcap` to be > 0, got nan."),
        ({"top_k": 0}, "expected `top_k` to be >= 1, got 0."),
        ({"fixed_k": -1}, "expected `fixed_k` to be >= 1, got -1."),
        ({"scale": float("inf")}, "expected `scale` to be finite, got inf."),
        ({"backend": "triton"}, "expected `backend` to serve these tensors"),
    ],
)
def test_parameter_out_of_range_is_refused(arguments, message):
    with pytest.raises(TokenWeightsError) as error:
        attention_entropy(QUERY, KEY, **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_window": 0}, "expected `local_window` to be >= 1, got 0."),
        ({"support_mass": (0.5, 1.5)}, "expected `support_mass` to be in (0, 1], got 1.5."),
        ({"support_mass": (0.0,)}, "expected `support_mass` to be in (0, 1], got 0.0."),
        ({"kinds": ()}, "expected `kinds` to name a statistic, got none."),
        ({"kinds": ("support_size",), "heads": "mean_entropy"}, "got 'support_size'."),
        ({"kinds": ("raw", "row_mass"), "heads": "mean_entropy"}, "got 'row_mass'."),
    ],
)
def test_statistic_without_a_meaning_is_refused(arguments, message):
    with pytest.raises(TokenWeightsError) as error:
        attention_statistics(QUERY, KEY, **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("query", "key", "message"),
    [
        (QUERY[:, :3], KEY, "expected `query` to have a multiple of the key heads, got 3"),
        (QUERY[:, :1], KEY, "expected `query` to have a multiple of the key heads, got 1"),
        (QUERY, KEY[:, :, :2], "expected `query` to be no longer than `key`, got 3 queries and 2"),
    ],
)
def test_heads_and_lengths_that_do_not_fit_are_refused(query, key, message):
    with pytest.raises(TokenWeightsError, match=message):
        attention_entropy(query, key)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key": KEY[..., :6]}, "expected `key` to have the query's dim 8, got 6"),
        ({"key": KEY[:1]}, "expected `key` to have the query's batch 2, got 1"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, r"`key_mask` to have shape \(2, 5\)"),
        ({"sinks": torch.ones(2)}, r"expected `sinks` to have shape \(4,\), got \(2,\)"),
        ({"lse": torch.ones(2, 4, 5)}, r"expected `lse` to have shape \(2, 4, 3\)"),
    ],
)
def test_shapes_are_refused_with_and_without_type_checks(arguments, message):
    arguments = {"query": QUERY, "key": KEY} | arguments
    with pytest.raises(jaxtyping.TypeCheckError):
        attention_entropy(**arguments)
    with pytest.raises(TokenWeightsError, match=message):
        attention_entropy.__wrapped__(**arguments)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("case", bad_input.CASES)
def test_bad_input_is_refused(case, backend):
    """`triton_cases.py` runs the same cases through the kernels."""
    change, message = bad_input.CASES[case]
    valid = bad_input.arguments()
    with pytest.raises(TokenWeightsError, match=message):
        attention_statistics(**valid | change(**valid), backend=backend)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_its_own_lse_is_taken_and_a_row_without_a_visible_key_is_zero(backend):
    valid = bad_input.arguments()
    mask = torch.ones(2, bad_input.TOKENS, dtype=torch.bool)
    mask[1] = False
    lse = bad_input.denominators(**valid)
    lse[1] = torch.nan  # nothing there is real
    options = {"key_mask": mask, "lse": lse, "local_window": 5, "backend": backend}
    options["received"] = Received()
    found = attention_statistics(**valid, **options)
    for value in vars(found).values():
        assert value[0].any() and not value[1].any()


def test_overflow_of_finite_values_is_refused():
    query = torch.full((1, 1, 3, 4), 3e38)
    with pytest.raises(TokenWeightsError, match=r"inner products of at most 8\.6e\+09, got"):
        attention_entropy(query, torch.ones(1, 1, 3, 4), scale=2.0)
    # The sum of these overflows, the scores do not.
    assert attention_entropy(query, torch.zeros(1, 1, 3, 4)).shape == (1, 3)


@pytest.mark.parametrize(
    ("cu_seqlens_q", "cu_seqlens_k", "message"),
    [
        ([0, 3], [0, 6], "expected `cu_seqlens_q` to rise from 0 to the 4 packed tokens"),
        ([1, 4], [0, 6], "expected `cu_seqlens_q` to rise from 0 to the 4 packed tokens"),
        ([0, 4], [0, 5], "expected `cu_seqlens_k` to rise from 0 to the 6 packed tokens"),
        ([0, 2, 1, 4], [0, 2, 4, 6], "expected `cu_seqlens_q` to rise from 0"),
        ([0, 3, 4], [0, 2, 6], "expected `query` to be no longer than `key`, got 3 queries and 2"),
    ],
)
def test_cumulative_lengths_that_do_not_cut_the_tokens_are_refused(
    cu_seqlens_q, cu_seqlens_k, message
):
    with pytest.raises(TokenWeightsError, match=message):
        attention_entropy_varlen(
            torch.ones(4, 2, 8),
            torch.ones(6, 2, 8),
            cu_seqlens_q=torch.tensor(cu_seqlens_q),
            cu_seqlens_k=torch.tensor(cu_seqlens_k),
        )
