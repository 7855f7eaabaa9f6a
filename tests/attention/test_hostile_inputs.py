"""Any call gives what float64 gives, or is refused by name: nothing in between."""

import math

import pytest
import torch
from attention.hostile import attention_calls
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweights import TokenWeightsError
from tokenweights.attention import (
    ENTROPY_KINDS,
    STATISTIC_KINDS,
    attention_entropy,
    attention_entropy_from_weights,
    attention_entropy_varlen,
    attention_statistics,
    attention_weights,
)

TOLERANCE = 1e-5


def assert_close(actual, expected, tolerance=TOLERANCE):
    error = (actual.double() - expected.double()).abs() / expected.double().abs().clamp_min(1.0)
    assert error.numel() == 0 or float(error.max()) <= tolerance


def outcome(function, /, **arguments):
    try:
        return function(**arguments)
    except TokenWeightsError as error:
        return error


def assert_statistics_close(actual, expected):
    for kind in STATISTIC_KINDS:
        value, wanted = getattr(actual, kind), getattr(expected, kind)
        if kind == "support_size":
            # The mass may meet a share within rounding.
            assert value.numel() == 0 or int((value - wanted).abs().max()) <= 1
        else:
            assert value.shape == wanted.shape and bool(wanted.isfinite().all())
            assert_close(value, wanted)


@settings(max_examples=200)
@given(attention_calls())
def test_backends_agree_or_refuse_alike(call):
    expected = outcome(attention_statistics, **call, backend="reference")
    actual = outcome(attention_statistics, **call, backend="chunked")
    if isinstance(expected, TokenWeightsError):
        assert str(actual) == str(expected)
    else:
        assert_statistics_close(actual, expected)


@settings(max_examples=100)
@given(attention_calls())
def test_weights_have_the_reference_entropy_or_are_refused(call):
    shared = ("query", "key", "key_mask", "sinks", "causal", "window", "scale", "softcap")
    arguments = {name: call[name] for name in shared}
    weights = outcome(attention_weights, **arguments)
    expected = outcome(attention_entropy, **arguments, kind="raw", backend="reference")
    if isinstance(expected, TokenWeightsError):
        assert isinstance(weights, TokenWeightsError)
        return
    assert_close(torch.special.entr(weights.double()).sum(-1), expected)
    mask, queries = call["key_mask"], call["query"].shape[2]
    real = torch.ones(weights.shape[:2]) if mask is None else mask[:, mask.shape[1] - queries :]
    assert_close(weights.sum(-1), real)


@settings(max_examples=100)
@given(
    st.sampled_from([1e-45, 1e-40, 1e-310, 6e-8, 1.0, 3e38, 1e308]),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.sampled_from(ENTROPY_KINDS),
    st.sampled_from(["mean_distribution", "mean_entropy", "none"]),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_given_weights_of_any_size(size, dtype, kind, heads, keys, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(2, 2, keys, keys, generator=generator, dtype=torch.float64)
    weights = (weights * size).clamp_max(torch.finfo(dtype).max).to(dtype)
    arguments = {"kind": kind, "heads": heads, "top_k": 2, "fixed_k": 2}
    actual = outcome(attention_entropy_from_weights, weights=weights, **arguments)
    visible = weights.double().tril()
    if isinstance(actual, TokenWeightsError):
        # Only where a row, or the first keys of one, came out as zeros.
        first = visible[..., : 2 if kind == "fixed" else keys]
        assert not bool(first.any(-1).all())
        return
    exact = visible / visible.amax((1, 3), keepdim=True)
    exact = exact.mean(1, keepdim=True) if heads == "mean_distribution" else exact
    count = torch.arange(1, keys + 1)
    if kind == "topk":
        exact = exact.sort(-1, descending=True).values
    if kind in ("topk", "fixed"):
        exact = exact[..., :2]
    entropy = torch.special.entr(exact / exact.sum(-1, keepdim=True)).sum(-1)
    if kind == "normalized":
        entropy = entropy / count.log().where(count > 1, 1.0)
    entropy = entropy.mean(1) if heads != "none" else entropy
    assert_close(actual, entropy)


# Worked by hand.


def logarithms(weights):
    """A query and keys whose scores at scale 1 are the logarithms of the weights."""
    key = torch.zeros(1, 1, len(weights), 2, dtype=torch.float64)
    key[0, 0, :, 0] = weights.log()
    return torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1, 1, 2), key


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_support_of_nearly_all_mass_counts_a_long_tail(backend):
    # One key holds all but 4e-6, which 4000 equal keys share: 3000.5 of them reach 1 - 0.9995e-6.
    query, key = logarithms(torch.tensor([1.0 - 4e-6, *[1e-9] * 4000], dtype=torch.float64))
    arguments = {"kinds": ("support_size",), "scale": 1.0, "support_mass": (1.0 - 0.9995e-6, 1.0)}
    sizes = attention_statistics(query, key, backend=backend, **arguments).support_size
    assert sizes.tolist() == [[[3002, 4001]]]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("sink", [1e3, 1e4, 1e6, 1e9])
@pytest.mark.parametrize("with_lse", [False, True])
def test_sinks_of_any_size_cancel_where_all_heads_have_them(backend, sink, with_lse):
    # Heads of equal scores at all keys but one, which each head gives three times the weight.
    key = torch.eye(4)[None, None].expand(1, 2, 4, 4)
    query = math.log(3) * torch.eye(4)[None, :2, None].expand(1, 2, 1, 4)
    arguments = {"sinks": torch.full((2,), sink), "scale": 1.0, "backend": backend}
    if with_lse:
        # Beside such a sink the keys are nothing. Float64, for a float32 sink would be refused.
        arguments["lse"] = torch.full((1, 2, 1), sink, dtype=torch.float64)
    weights = torch.tensor([4.0, 4.0, 2.0, 2.0], dtype=torch.float64) / 12
    found = attention_statistics(query, key, **arguments)
    assert_close(found.raw[0, 0], torch.special.entr(weights).sum())
    assert_close(found.max_weight[0, 0], weights.max())
    assert float(found.row_mass) < 1e-20


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_sink_in_one_head_leaves_the_layer_to_the_others(backend):
    query = torch.tensor([[[[5.0]], [[0.0]]]])
    key = torch.tensor([[[[0.0], [1.0]]]])
    for sink in (1e4, 1e9):
        arguments = {"sinks": torch.tensor([sink, -math.inf]), "scale": 1.0, "kind": "raw"}
        entropy = attention_entropy(query, key, backend=backend, **arguments)
        assert_close(entropy, torch.tensor([[math.log(2)]]))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_large_scores_that_differ_by_little_are_told_apart(backend):
    # Scores near a million that are 1.03 apart: float32 products know sixteenths.
    query = torch.tensor([973.3, 1.0]).expand(1, 1, 1, 2)
    key = torch.tensor([[1017.7, 0.0], [1017.7, 1.03]])[None, None]
    share = torch.tensor([0.0, 1.03], dtype=torch.float64).softmax(0)
    entropy = attention_entropy(query, key, scale=1.0, kind="raw", backend=backend)
    assert_close(entropy, torch.special.entr(share).sum().expand(1, 1))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sinks": torch.tensor([0.0, math.nan])}, "expected `sinks` to be at most 8.6e"),
        ({"sinks": torch.tensor([0.0, math.inf])}, "expected `sinks` to be at most 8.6e"),
        ({"sinks": torch.tensor([0.0, 1e10])}, "expected `sinks` to be at most 8.6e"),
        ({"scale": 1e12}, "to have scaled inner products of at most 8.6e"),
        ({"scale": 10**400}, "expected `scale` to be finite"),
        ({"kinds": ("support_size",), "support_mass": ()}, "`support_mass` to name a share"),
        ({"lse": torch.zeros(1, 2, 3).half()}, "expected `lse` to be float32 or float64"),
        ({"query": torch.ones(1, 2, 3, 0), "key": torch.ones(1, 2, 3, 0)}, "a dim of at least 1"),
    ],
)
def test_what_no_backend_can_resolve_is_refused(backend, arguments, message):
    given = {"query": torch.ones(1, 2, 3, 4), "key": torch.ones(1, 2, 3, 4)} | arguments
    with pytest.raises(TokenWeightsError) as error:
        attention_statistics(**given, backend=backend)
    assert message in str(error.value)


def test_rows_to_look_at_are_refused_as_their_entropies_are():
    query, key = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4)
    key[0, 0, 1, 2] = math.nan
    with pytest.raises(TokenWeightsError, match="`attention_weights`: expected `key` to be finite"):
        attention_weights(query, key)
    masked = attention_weights(query, key, key_mask=torch.tensor([[True, False, True]]))
    assert_close(masked[0, 2], torch.tensor([0.5, 0.0, 0.5]))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_nothing_asked_gives_nothing(backend):
    for batch, queries, keys in ((2, 0, 3), (0, 2, 3), (0, 0, 0), (2, 0, 0)):
        query, key = torch.zeros(batch, 2, queries, 4), torch.zeros(batch, 2, keys, 4)
        lse = torch.zeros(batch, 2, queries)
        found = attention_statistics(query, key, lse=lse, backend=backend)
        assert found.raw.shape == (batch, queries)
        assert found.support_size.shape == (batch, queries, 4)
        assert attention_weights(query, key).shape == (batch, queries, keys)
    empty = attention_entropy_varlen(
        torch.zeros(0, 2, 4),
        torch.zeros(0, 2, 4),
        cu_seqlens_q=torch.tensor([0]),
        cu_seqlens_k=torch.tensor([0]),
        backend=backend,
    )
    assert empty.shape == (0,)
    with pytest.raises(TokenWeightsError, match="to have at least one head"):
        attention_entropy_from_weights(torch.zeros(1, 0, 2, 2))
