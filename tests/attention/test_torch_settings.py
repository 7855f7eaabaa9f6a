"""Nothing in the room depends on how the process around it has set torch up."""

from contextlib import contextmanager

import pytest
import torch

from tokenweights.attention import (
    Received,
    attention_entropy_from_weights,
    attention_entropy_varlen,
    attention_statistics,
    attention_weights,
    packed_distance,
    packed_entropy,
    packed_received,
    sequence_parallel_distance,
    sequence_parallel_entropy,
    sequence_parallel_received,
    tensor_parallel_distance,
    tensor_parallel_entropy,
    tensor_parallel_received,
)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float16": lambda: default_dtype(torch.float16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "deterministic algorithms": deterministic_algorithms,
}


def inputs(dtype, *, peaked=False, strided=False):
    """Query, key and sinks; peaked scores take the products that float32 does not resolve."""
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(2, 40, heads, 16, generator=generator, dtype=torch.float32).to(dtype)
        for heads in (4, 2)
    )
    query = query * 40 if peaked else query
    sinks = torch.randn(4, generator=generator, dtype=torch.float32)
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    return (query, key, sinks) if strided else (query.contiguous(), key.contiguous(), sinks)


def results(query, key, sinks):
    """What every function of the room returns, one tensor after another."""
    arguments = {"sinks": sinks, "top_k": 5, "fixed_k": 5, "local_window": 9}
    for heads in ("mean_distribution", "none"):
        for backend in ("chunked", "reference"):
            options = arguments | {"heads": heads, "backend": backend, "softcap": 200.0}
            options["received"], options["distance_bound"] = Received((1, 30)), 9
            yield from vars(attention_statistics(query, key, **options)).values()
    weights = attention_weights(query, key, sinks=sinks)
    yield weights
    for kind in ("normalized", "topk", "fixed"):
        yield attention_entropy_from_weights(weights[:, None], kind=kind, top_k=5, fixed_k=5)
    bounds = torch.tensor([0, 15, 40])
    rows = query[0].transpose(0, 1), key[0].transpose(0, 1)
    yield attention_entropy_varlen(*rows, cu_seqlens_q=bounds, cu_seqlens_k=bounds, sinks=sinks)
    places = torch.arange(40)
    for entropy, distance, received, values in (
        (packed_entropy, packed_distance, packed_received, (*rows, places)),
        (
            sequence_parallel_entropy,
            sequence_parallel_distance,
            sequence_parallel_received,
            (query, key, places),
        ),
        (
            tensor_parallel_entropy,
            tensor_parallel_distance,
            tensor_parallel_received,
            (query, key),
        ),
    ):
        yield entropy(*values, sinks=sinks)
        yield distance(*values, sinks=sinks, bound=9)
        for reduction in ("mean", "max"):
            yield received(*values, sinks=sinks, horizon=(1, 30), reduction=reduction)


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_process_change_nothing(setting, dtype, peaked):
    given = inputs(dtype, peaked=peaked)
    expected = list(results(*given))
    with SETTINGS[setting]():
        found = list(results(*given))
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == wanted.dtype and torch.equal(value, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_nothing(dtype):
    expected = results(*inputs(dtype))
    for value, wanted in zip(results(*inputs(dtype, strided=True)), expected, strict=True):
        assert torch.equal(value, wanted)
