"""The Triton kernels against the float64 reference, in Triton's interpreter.

Run by `test_triton.py` in a process of its own, since TRITON_INTERPRET=1 has to be set before
triton is imported; by hand: `TRITON_INTERPRET=1 pytest tests/attention/triton_cases.py`. On a
machine with a GPU, `TRITON_CASES_DEVICE=cuda pytest tests/attention/triton_cases.py` runs the same
cases on the device.
"""

import math
import os
from dataclasses import replace

import pytest
import torch
from attention import bad_input
from attention.hostile import FLOATS, attention_calls
from hypothesis import given, settings

from tokenweights import TokenWeightsError
from tokenweights.attention import (
    ENTROPY_KINDS,
    STATISTIC_KINDS,
    attention_distance,
    attention_entropy,
    attention_entropy_varlen,
    attention_statistics,
    triton_backend,
    triton_work,
)
from tokenweights.attention.layout import padded_batch
from tokenweights.attention.results import empty_results
from tokenweights.attention.statistics import Logits, Request
from tokenweights.attention.triton_configuration import INTERPRETER, Tiles

# The interpreter evaluates both sides of every selection, overflow on the dropped one included.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = os.environ.get("TRITON_CASES_DEVICE", "cpu")
TOLERANCE = 5e-6
# What needs no selection; selecting takes the interpreter longer than all the rest.
SUMS = tuple(kind for kind in STATISTIC_KINDS if kind not in ("topk", "support_size"))
PARAMETERS = {"top_k": 20, "fixed_k": 30, "local_window": 40}


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_statistics_close(actual, expected, tolerance=TOLERANCE):
    for kind in STATISTIC_KINDS:
        value, wanted = getattr(actual, kind), getattr(expected, kind)
        if wanted is None:
            assert value is None
        elif kind == "support_size":
            assert value.numel() == 0 or int((value - wanted).abs().max()) <= 1
        else:
            assert value.dtype == torch.float32 and value.shape == wanted.shape
            error = (value.double() - wanted).abs() / wanted.abs().clamp_min(1.0)
            assert error.numel() == 0 or float(error.max()) <= tolerance, kind


def assert_agrees(query, key, *, lse=None, workspace_bytes=2**28, tolerance=TOLERANCE, **arguments):
    arguments = PARAMETERS | arguments
    actual = attention_statistics(
        query, key, backend="triton", lse=lse, workspace_bytes=workspace_bytes, **arguments
    )
    expected = attention_statistics(query, key, backend="reference", **arguments)
    assert_statistics_close(actual, expected, tolerance)


def log_sum_exp(query, key, *, sinks=None):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.double() @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5
    queries, keys = scores.shape[-2:]
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=DEVICE).triu(keys - queries + 1)
    lse = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[None, :, None])
    return lse.float()


# Types, heads, dimensions: 75 queries cross two borders of 32 rows, 140 keys two of 64 columns. A
# device has larger tiles and no reason to be spared.
QUERIES, KEYS = (75, 140) if DEVICE == "cpu" else (300, 1100)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "dim"), [(2, 64), (4, 128)])
def test_types_and_dimensions(dtype, kv_heads, dim):
    query = normal(1, 4, QUERIES, dim, dtype=dtype)
    key = normal(1, kv_heads, KEYS, dim, seed=1)
    assert_agrees(query, key.to(dtype), kinds=STATISTIC_KINDS if dim == 64 else SUMS)


@pytest.mark.parametrize("dim", [8, 96, 256])
@pytest.mark.parametrize("dtype", DTYPES[:1] if DEVICE == "cpu" else DTYPES)
def test_other_head_dimensions(dim, dtype):
    query, key = normal(1, 2, 35, dim, dtype=dtype), normal(1, 1, 70, dim, seed=1, dtype=dtype)
    assert_agrees(query, key, kinds=SUMS)


@pytest.mark.parametrize("bound", [1, 16, 50, 10_000])
@pytest.mark.parametrize("arguments", [{}, {"window": 40}, {"causal": False}], ids=str)
def test_distances_with_a_bound(bound, arguments):
    query, key = normal(1, 4, QUERIES, 64), normal(1, 2, KEYS, 64, seed=1)
    options = {"kinds": ("mean_distance", "local_mass"), "distance_bound": bound} | arguments
    assert_agrees(query, key, **options)
    far = attention_distance(query, key, bound=bound, backend="triton", **arguments)
    expected = attention_distance(query, key, bound=bound, backend="reference", **arguments)
    error = (far.double() - expected).abs() / expected.clamp_min(1.0)
    assert float(error.max()) <= TOLERANCE


@pytest.mark.parametrize("heads", ["none", "mean_entropy"])
def test_heads_kept_apart(heads):
    kinds = STATISTIC_KINDS if heads == "none" else ENTROPY_KINDS
    assert_agrees(normal(1, 4, 40, 64), normal(1, 2, 70, 64, seed=1), heads=heads, kinds=kinds)


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("dim", [64, 96])
def test_ways_of_loading(overlapped, shared, descriptors, dim):
    if DEVICE != "cpu" and descriptors and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no tensor descriptors")
    query, key = normal(2, 4, 40, dim).to(torch.float16), normal(2, 2, 70, dim, seed=1).half()
    tiles = replace(
        INTERPRETER.sums if DEVICE == "cpu" else Tiles(64, 64, 4, 2),
        shared=shared,
        overlapped=overlapped,
    )
    configuration = replace(
        INTERPRETER, weights=tiles, sums=tiles, denominators=tiles, descriptors=descriptors
    )
    mask = torch.ones(2, 70, dtype=torch.bool, device=DEVICE)
    mask[0, :35] = False
    query[0, :, :5], key[0, :, :35] = torch.nan, torch.nan
    kinds = STATISTIC_KINDS if shared and not overlapped else SUMS
    request = Request(kinds, 20, 30, (0.5, 0.9), 40)
    results = empty_results(request, (2, 1, 40), query)
    triton_backend.triton_sweep(
        "test",
        padded_batch(query, key, mask, None),
        request,
        Logits(scale=dim**-0.5),
        results,
        per_head=False,
        sinks=None,
        workspace_bytes=2**20,
        configuration=configuration,
    )
    arguments = PARAMETERS | {"kinds": kinds, "support_mass": (0.5, 0.9)}
    expected = attention_statistics(query, key, key_mask=mask, backend="reference", **arguments)
    found = {kind: value[:, 0] for kind, value in results.items()}
    assert_statistics_close(type(expected)(**found), expected)


# Which keys a query sees.


@pytest.mark.parametrize(
    "arguments",
    [
        {"window": 50},
        {"window": 1},
        {"softcap": 5.0},
        {"softcap": 0.2},
        {"causal": False},
        {"scale": 0.5},
        {"scale": -0.2},
        {"window": 70, "softcap": 3.0, "sinks": True},
    ],
    ids=str,
)
def test_logits(arguments):
    if arguments.get("sinks"):
        arguments = arguments | {"sinks": normal(4, seed=2)}
    # Of these only the window and the direction reach the selection.
    kinds = STATISTIC_KINDS if {"window", "causal"} & set(arguments) else SUMS
    assert_agrees(normal(1, 4, 75, 64), normal(1, 2, 140, 64, seed=1), kinds=kinds, **arguments)


@pytest.mark.parametrize("side", ["left", "right", "holes", "empty row"])
def test_padding_is_never_read(side):
    query, key = normal(3, 2, 50, 64), normal(3, 2, 80, 64, seed=1)
    mask = torch.ones(3, 80, dtype=torch.bool, device=DEVICE)
    if side == "left":
        mask[0, :40] = False
    elif side == "right":
        mask[1, 60:] = False
    elif side == "holes":
        mask[0, 45], mask[1, 60:], mask[2, 3:35] = False, False, False
    else:
        mask[1] = False
    key.transpose(1, 2)[~mask] = torch.nan
    query.transpose(1, 2)[~mask[:, 30:]] = torch.inf
    assert_agrees(query, key, key_mask=mask)


@pytest.mark.parametrize("with_lse", [False, True])
def test_packed_sequences(with_lse):
    lengths, asked = [70, 1, 45], [40, 1, 45]
    queries, keys = normal(86, 4, 64), normal(116, 2, 64, seed=1)
    starts = [torch.tensor([0, *values]).cumsum(0) for values in (asked, lengths)]
    lse = None
    if with_lse:
        parts = zip(*(x.split(n) for x, n in ((queries, asked), (keys, lengths))), strict=True)
        lse = [log_sum_exp(*(x.transpose(0, 1)[None] for x in part))[0] for part in parts]
        lse = torch.cat(lse, 1)
    for kind in ENTROPY_KINDS:
        arguments = {"kind": kind, "top_k": 20, "fixed_k": 20}
        arguments |= {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}
        actual = attention_entropy_varlen(queries, keys, lse=lse, backend="triton", **arguments)
        expected = attention_entropy_varlen(queries, keys, backend="reference", **arguments)
        assert float((actual - expected).abs().max()) <= TOLERANCE


def test_strided_inputs_are_read_in_place():
    # As a transformer leaves them: `batch token heads dim`, transposed.
    query = normal(2, 40, 4, 64).transpose(1, 2)
    key = normal(2, 70, 2, 64, seed=1).transpose(1, 2)
    assert_agrees(query, key, kinds=("raw", "fixed"))
    assert_agrees(query[..., ::2], key[..., ::2], kinds=("raw",))


# Parts, workspace, selection.


def test_long_rows_are_split_into_parts(monkeypatch):
    monkeypatch.setattr(triton_work, "LEAST_PART", 64)
    monkeypatch.setattr(triton_work, "MOST_PARTS", 3)
    query, key = normal(1, 2, 40, 64), normal(1, 1, 330, 64, seed=1)
    assert_agrees(query, key)
    assert_agrees(query, key, kinds=("raw", "max_weight", "fixed"), fixed_k=200)
    assert_agrees(query, key, window=250)


@pytest.mark.parametrize("workspace_bytes", [1, 1500, 4000])
def test_small_workspaces_change_nothing(workspace_bytes):
    query, key = normal(1, 2, 5, 64), normal(1, 2, 140, 64, seed=1)
    kinds = ("topk", "support_size", "raw")
    assert_agrees(query, key, kinds=kinds, workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("top_k", [1, 64, 65, 1000])
def test_number_of_selected_weights(top_k):
    assert_agrees(normal(1, 2, 33, 64), normal(1, 2, 130, 64, seed=1), top_k=top_k, kinds=("topk",))


def test_equal_weights_are_ties_that_are_counted():
    query, key = normal(1, 2, 40, 64) * 0, normal(1, 2, 130, 64, seed=1)
    assert_agrees(query, key, support_mass=(0.25, 0.5, 1.0))
    # Two values, each many times: the border of both selections lies within a tie.
    key = key.sign()[..., :1].expand_as(key).contiguous()
    assert_agrees(query + 0.03, key, support_mass=(0.3, 0.9), top_k=30)


def test_peaked_rows():
    query, key = normal(1, 4, 40, 64) * 20, normal(1, 2, 100, 64, seed=1)
    assert_agrees(query, key, fixed_k=3, top_k=3, tolerance=1e-4)


# Known denominators, and refusals.


@pytest.mark.parametrize("with_sinks", [False, True])
def test_known_denominators(with_sinks):
    query, key = normal(2, 4, 40, 64), normal(2, 2, 70, 64, seed=1)
    sinks = normal(4, seed=2) if with_sinks else None
    lse = log_sum_exp(query, key, sinks=sinks)
    assert_agrees(query, key, lse=lse, sinks=sinks)
    assert_agrees(query, key, lse=lse, sinks=sinks, kinds=("fixed",), fixed_k=7)


@pytest.mark.parametrize("kinds", [("fixed",), ("raw",), ("topk",)])
@pytest.mark.parametrize("wrong", ["scale", "nan", "sinks"])
def test_foreign_denominators_are_refused(kinds, wrong):
    query, key = normal(1, 2, 40, 64), normal(1, 2, 70, 64, seed=1)
    lse = {
        "scale": log_sum_exp(query * 1.1, key),
        "nan": torch.full((1, 2, 40), torch.nan, device=DEVICE),
        "sinks": log_sum_exp(query, key, sinks=normal(2)),
    }[wrong]
    with pytest.raises(TokenWeightsError, match="does not belong to these q and k"):
        attention_statistics(query, key, kinds=kinds, lse=lse, fixed_k=4, backend="triton")


def test_rows_without_representable_mass_are_computed_from_logarithms():
    # Every query looks at key 2 with a lead of 400 nats; keys 0 and 1 have odds 1 : 3.
    key = torch.zeros(1, 1, 6, 16, device=DEVICE)
    key[0, 0, :, 0] = torch.tensor([0.0, 1.0986123, 400.0, 0.0, 0.0, 0.0])
    query = torch.zeros(1, 2, 6, 16, device=DEVICE)
    query[..., 0] = 1.0
    arguments = {"scale": 1.0, "fixed_k": 2, "kinds": ("fixed", "raw", "support_size")}
    assert_agrees(query, key, **arguments)
    assert_agrees(query, key, window=3, **arguments)
    assert_agrees(query, key, sinks=torch.tensor([600.0, 500.0], device=DEVICE), **arguments)
    mask = torch.tensor([[True, True, True, False, True, True]], device=DEVICE)
    assert_agrees(query, key, key_mask=mask, **arguments)


@pytest.mark.parametrize("kinds", [("raw",), ("support_size",), ("topk", "fixed")])
def test_overflow_and_non_finite_values_are_refused(kinds):
    query, key = normal(1, 2, 20, 64), normal(1, 2, 20, 64, seed=1)
    arguments = {"kinds": kinds, "backend": "triton"}
    with pytest.raises(TokenWeightsError, match=r"inner products of at most 8\.6e\+09, got"):
        attention_statistics(query * 1e37, key * 1e37, **arguments)
    for bad in (torch.nan, torch.inf):
        broken = query.clone()
        broken[0, 0, 3, 3] = bad
        with pytest.raises(TokenWeightsError, match="`query` to be finite at real positions"):
            attention_statistics(broken, key, **arguments)


@pytest.mark.parametrize("case", bad_input.CASES)
def test_bad_input_is_refused(case):
    change, message = bad_input.CASES[case]
    valid = bad_input.arguments(DEVICE)
    with pytest.raises(TokenWeightsError, match=message):
        attention_statistics(**valid | change(**valid), backend="triton")


def test_what_the_kernels_cannot_serve_is_refused_by_name():
    wide = normal(1, 2, 4, 512)
    with pytest.raises(TokenWeightsError, match="the head dimension 512 is above 256"):
        attention_entropy(wide, wide, backend="triton")
    with pytest.raises(TokenWeightsError, match=r"inputs are torch\.float64"):
        attention_entropy(wide.double(), wide.double(), backend="triton")
    with pytest.raises(TokenWeightsError, match=r"torch\.float32 and torch\.float16"):
        attention_entropy(wide[..., :64], wide[..., :64].half(), backend="triton")


@settings(max_examples=8 if DEVICE == "cpu" else 100)
@given(attention_calls(dtypes=[dtype for dtype in FLOATS if dtype != torch.float64]))
def test_hostile_input_is_measured_or_refused(call):
    call = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in call.items()}
    try:
        expected = attention_statistics(**call, backend="reference")
    except TokenWeightsError as error:
        with pytest.raises(TokenWeightsError) as refusal:
            attention_statistics(**call, backend="triton")
        assert str(refusal.value) == str(error)
    else:
        actual = attention_statistics(**call, backend="triton")
        # Where scores may be hundreds, float32 products resolve them to this.
        assert_statistics_close(actual, expected, 1e-4)


def test_support_of_nearly_all_mass_counts_a_long_tail():
    # One key holds all but 3e-7 of the mass, which 300 equal keys share.
    query, key = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 301, 16)
    query[..., 0], key[0, 0, 1:, 0] = 1.0, math.log(1e-9)
    masses = {"kinds": ("support_size",), "support_mass": (1.0 - 1.005e-7, 0.999999, 1.0)}
    for kinds in (("support_size",), ("support_size", "topk")):
        arguments = masses | {"kinds": kinds, "scale": 1.0, "backend": "triton"}
        found = attention_statistics(query.to(DEVICE), key.to(DEVICE), **arguments)
        assert found.support_size.tolist() == [[[201, 1, 301]]]


def test_the_default_type_changes_nothing():
    query, key = normal(1, 2, 20, 64), normal(1, 2, 40, 64, seed=1)
    expected = attention_statistics(query, key, backend="triton", **PARAMETERS)
    torch.set_default_dtype(torch.float64)
    try:
        found = attention_statistics(query, key, backend="triton", **PARAMETERS)
    finally:
        torch.set_default_dtype(torch.float32)
    for kind in STATISTIC_KINDS:
        assert torch.equal(getattr(found, kind), getattr(expected, kind))


def test_nothing_asked_gives_nothing():
    empty = attention_entropy(normal(2, 2, 0, 64), normal(2, 2, 3, 64), backend="triton")
    assert empty.shape == (2, 0)
    mask = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    query = normal(2, 2, 3, 64)
    assert not attention_entropy(query, query, key_mask=mask, backend="triton").any()
