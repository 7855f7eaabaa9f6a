"""Attention entropy on a GPU, next to the attention forward of the same layer.

The whole comparison, with figures, is `report.py`; this is what `--benchmark-compare` tracks.
"""

import pytest
import torch
from contenders import log_sum_exp, sdpa
from torch.nn.attention import SDPBackend

from tokenweights import attention_entropy, attention_statistics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=[4096, 16384, 32768])
def layer(request):
    query = torch.randn(1, 32, request.param, 128, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(1, 8, request.param, 128, device="cuda", dtype=torch.bfloat16)
    return query, key, log_sum_exp(query, key)


def timed(benchmark, function):
    function()

    def run():
        function()
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20, warmup_rounds=3)


def test_entropy(benchmark, layer):
    query, key, lse = layer
    found = attention_entropy(query, key, lse=lse, backend="triton")[:, -4:]
    expected = attention_entropy(query[:, :, -4:], key, backend="reference")
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    timed(benchmark, lambda: attention_entropy(query, key, lse=lse, backend="triton"))


def test_all_statistics(benchmark, layer):
    query, key, lse = layer
    timed(benchmark, lambda: attention_statistics(query, key, lse=lse, backend="triton"))


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
def test_attention_forward(benchmark, layer, backend):
    query, key, _ = layer
    timed(benchmark, lambda: sdpa(query, key, backend))
