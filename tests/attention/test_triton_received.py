"""The Triton kernel of attention received where there is no GPU: interpreted, and compiled.

Both need a process of their own, as in `test_triton.py`.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from attention.test_triton import finished, with_triton

from tokenweights.attention.received import Received
from tokenweights.attention.statistics import Logits


@with_triton
def test_the_kernel_agrees_with_the_reference_in_the_interpreter():
    cases = Path(__file__).with_name("triton_received_cases.py")
    options = ["-m", "pytest", str(cases), "-q", "-p", "no:cacheprovider", "-x"]
    run = finished(options, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@with_triton
@pytest.mark.skipif(sys.platform != "linux", reason="triton compiles on Linux only")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_shipped_configurations_fit_the_device(arch):
    """No local memory, and shared memory within the limit, read from the binaries."""
    run = finished(["benchmarks/kernels/compiled.py", "--columns", "--json", "--arch", str(arch)])
    assert run.returncode == 0, run.stderr[-3000:]
    records = json.loads(run.stdout)
    assert {record["kernel"] for record in records} == {"key_columns"} and len(records) > 8
    for record in records:
        assert record["registers"] > 0 and record["fits"], record
        assert record["stack"] == 0 and record["local"] == 0, record
    products = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
    half = {record["product"] for record in records if "fp32" not in record["note"]}
    assert half == {products[arch]}


@with_triton
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("horizon", [(None, None), (3, None), (None, 9), (4, 6)])
def test_every_pair_that_counts_is_in_the_table_once(horizon, window, causal):
    from tokenweights.attention.triton_received import key_block_table

    if window is not None and not causal:
        return
    queries, every, out_heads = 30, 50, 2
    sequences = torch.tensor([[0, 0, queries, 0, every]], dtype=torch.int32)
    logits = Logits(scale=1.0, causal=causal, window=window)
    table = key_block_table(sequences, logits, Received(horizon), keys=16, out_heads=out_heads)
    times = torch.zeros(out_heads, queries, every)
    for unit in table.tolist():
        times[unit[6], unit[1] : unit[2], unit[3] : unit[4]] += 1
    assert bool((times <= 1).all())
    distance = torch.arange(every - queries, every)[:, None] - torch.arange(every)
    counted = distance >= (0 if causal else -every)
    counted &= distance >= (horizon[0] if horizon[0] is not None else -every)
    for most in (horizon[1], None if window is None else window - 1):
        counted &= distance <= (every if most is None else most)
    assert bool((times[:, counted] == 1).all())
