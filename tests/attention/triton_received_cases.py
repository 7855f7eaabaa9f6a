"""Columns of the Triton kernel beside the reference; run in the interpreter, or on a device."""

import os

import pytest
import torch
from attention.triton_cases import normal

from tokenweights.attention import (
    Received,
    attention_received,
    attention_received_varlen,
    attention_statistics,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = os.environ.get("TRITON_CASES_DEVICE", "cpu")


def assert_agrees(query, key, **arguments):
    found = attention_received(query, key, backend="triton", **arguments)
    expected = attention_received(query, key, backend="reference", **arguments)
    assert found.shape == expected.shape and found.dtype == torch.float32
    error = (found.double() - expected).abs() / expected.abs().clamp_min(1.0)
    assert error.numel() == 0 or float(error.max()) <= 1e-5


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
@pytest.mark.parametrize("horizon", [(None, None), (3, 40), (None, 70), (50, None), (200, None)])
def test_horizons_and_reductions(horizon, reduction):
    query, key = normal(2, 4, 75, 64), normal(2, 2, 140, 64, seed=1)
    assert_agrees(query, key, horizon=horizon, reduction=reduction)


@pytest.mark.parametrize("heads", ["none", [0, 3]])
def test_heads(heads):
    query, key = normal(1, 4, 40, 64), normal(1, 2, 70, 64, seed=1)
    assert_agrees(query, key, heads=heads, horizon=(1, 30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [24, 128])
def test_types_and_dimensions(dtype, dim):
    query, key = normal(1, 4, 40, dim, dtype=dtype), normal(1, 2, 70, dim, seed=1, dtype=dtype)
    assert_agrees(query, key, reduction="sum")


@pytest.mark.parametrize(
    "arguments",
    [
        {"window": 50},
        {"window": 9, "horizon": (2, 30)},
        {"softcap": 2.0},
        {"causal": False},
        {"causal": False, "horizon": (None, 5)},
        {"scale": -0.2},
        {"sinks": True, "window": 70, "softcap": 3.0},
    ],
    ids=str,
)
def test_logits(arguments):
    if arguments.get("sinks"):
        arguments = arguments | {"sinks": normal(4, seed=2)}
    assert_agrees(normal(1, 4, 75, 64), normal(1, 2, 140, 64, seed=1), **arguments)


@pytest.mark.parametrize("side", ["left", "holes", "empty row"])
def test_padding_is_never_read_and_only_asked_rows_count(side):
    query, key = normal(3, 2, 50, 64), normal(3, 2, 80, 64, seed=1)
    mask = torch.ones(3, 80, dtype=torch.bool, device=DEVICE)
    if side == "left":
        mask[0, :40] = False
    elif side == "holes":
        mask[0, 45], mask[1, 60:], mask[2, 3:35] = False, False, False
    else:
        mask[1] = False
    key.transpose(1, 2)[~mask] = torch.nan
    query.transpose(1, 2)[~mask[:, 30:]] = torch.inf
    rows = normal(3, 50, seed=4) > 0
    assert_agrees(query, key, key_mask=mask, rows=rows, horizon=(1, 40))


def test_packed_sequences():
    queries, keys = normal(86, 4, 64), normal(116, 2, 64, seed=1)
    options = {
        "cu_seqlens_q": torch.tensor([0, 40, 41, 86]),
        "cu_seqlens_k": torch.tensor([0, 70, 71, 116]),
        "horizon": (2, 30),
    }
    found = attention_received_varlen(queries, keys, backend="triton", **options)
    expected = attention_received_varlen(queries, keys, backend="reference", **options)
    assert float((found.double() - expected).abs().max()) <= 1e-5


def test_beside_the_entropy_and_the_same_at_every_launch():
    query, key = normal(1, 4, 75, 64), normal(1, 2, 140, 64, seed=1)
    options = {"kinds": ("raw", "topk"), "received": Received((1, 40), "max"), "top_k": 9}
    found, again = (attention_statistics(query, key, backend="triton", **options) for _ in "ab")
    expected = attention_statistics(query, key, backend="reference", **options)
    for kind in ("raw", "topk", "received"):
        assert torch.equal(getattr(found, kind), getattr(again, kind))
        error = (getattr(found, kind).double() - getattr(expected, kind)).abs().max()
        assert float(error) <= 1e-5, kind
