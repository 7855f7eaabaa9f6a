"""The Triton kernels where there is no GPU: interpreted, and compiled ahead of time.

Both need a process of their own: `TRITON_INTERPRET` is read when triton is imported.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenweights import TokenWeightsError, attention_entropy
from tokenweights.attention.triton_configuration import triton_refusal
from tokenweights.attention.triton_work import item_table, unit_table, workspace_chunks

ROOT = Path(__file__).parents[2]
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def finished(arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    kept.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=kept | environment,
    )


@with_triton
@pytest.mark.parametrize("part", ["types or ways or logits", "not (types or ways or logits)"])
def test_kernels_agree_with_the_reference_in_the_interpreter(part):
    cases = Path(__file__).with_name("triton_cases.py")
    options = ["-m", "pytest", str(cases), "-q", "-k", part, "-p", "no:cacheprovider", "-x"]
    run = finished(options, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@with_triton
@pytest.mark.skipif(sys.platform != "linux", reason="triton compiles on Linux only")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_shipped_configurations_fit_the_device(arch):
    """No local memory and shared memory within the limit, read from the binaries."""
    run = finished(["benchmarks/kernels/compiled.py", "--json", "--arch", str(arch)])
    assert run.returncode == 0, run.stderr[-3000:]
    records = json.loads(run.stdout)
    assert {record["kernel"] for record in records} == {"log_sum_exp", "mean_weights", "selections"}
    limit = {80: 166912, 90: 232448, 100: 232448}[arch]
    for record in records:
        assert record["registers"] > 0
        assert record["stack"] == 0 and record["local"] == 0, record
        assert record["shared"] <= limit, record


@with_triton
def test_report_runs_at_toy_size(tmp_path):
    options = ["--device", "cpu", "--toy", "--tokens", "40", "--output", str(tmp_path)]
    names = ["--only", "entropy", "all statistics", "eager", "attention forward"]
    run = finished(["-W", "ignore", "benchmarks/kernels/report.py", *options, *names])
    assert run.returncode == 0, run.stderr[-3000:]
    names = {record["name"] for record in json.loads((tmp_path / "results.json").read_text())}
    assert {"entropy, lse given", "eager, materialised", "attention forward, SDPA"} <= names
    assert "| 40 | entropy |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "times.png").stat().st_size > 1000


# Dispatch.


def test_refusals_name_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query = torch.zeros(1, 2, 3, 64)
    if importlib.util.find_spec("triton") is not None:
        assert "TRITON_INTERPRET=1 is not set" in str(triton_refusal(query, query))
        with pytest.raises(TokenWeightsError, match="Here the tensors are on the CPU"):
            attention_entropy(query, query, backend="triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TokenWeightsError, match="Here triton is not installed; pass"):
        attention_entropy(query, query, backend="triton")


def test_auto_takes_the_chunked_backend_on_a_cpu():
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    chunked = attention_entropy(query, key, backend="chunked")
    assert torch.equal(attention_entropy(query, key), chunked)


def test_workspace_that_holds_nothing_is_refused():
    query = torch.zeros(1, 2, 3, 8)
    with pytest.raises(TokenWeightsError, match="expected `workspace_bytes` to be >= 1, got 0"):
        attention_entropy(query, query, workspace_bytes=0)


# Tables of work.


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("causal", [True, False])
def test_items_cover_every_visible_key_of_every_row_once(window, causal):
    from tokenweights.attention.statistics import Logits

    if window is not None and not causal:
        return
    sequences = torch.tensor([[0, 3, 70, 10, 200], [1, 0, 1, 0, 1], [1, 5, 33, 5, 33]])
    logits = Logits(1.0, causal=causal, window=window)
    items = item_table(unit_table(sequences.int(), logits, rows=32), 48)
    for index, (_, _, queries, _, keys) in enumerate(sequences.tolist()):
        seen = torch.zeros(queries, keys, dtype=torch.int32)
        for owner, first, stop, start, end, *_ in items.tolist():
            if owner == index:
                assert 0 < stop - first <= 32 and 0 < end - start <= 48
                seen[first:stop, start:end] += 1
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        visible = (distance >= 0) if causal else torch.ones(queries, keys, dtype=torch.bool)
        if window is not None:
            visible &= distance < window
        assert int(seen.max()) == 1
        assert bool((seen[visible] == 1).all())


def test_workspace_chunks_stay_within_the_bytes_and_do_not_overlap():
    from tokenweights.attention.statistics import Logits

    sequences = torch.tensor([[0, 0, 100, 0, 300], [1, 0, 100, 0, 100]], dtype=torch.int32)
    units = unit_table(sequences, Logits(1.0), rows=16, out_heads=2)
    bound, found = 40_000, 0
    for chunk, size in workspace_chunks(units, 64, bound):
        assert 4 * size <= bound
        used = torch.zeros(size, dtype=torch.int32)
        for _, first, stop, start, end, _, _, place, width in chunk.tolist():
            for row in range(stop - first):
                used[place + start + row * width : place + row * width + end] += 1
                found += end - start
        assert int(used.max()) == 1
    assert found == sum((u[2] - u[1]) * (u[4] - u[3]) for u in units.tolist())
