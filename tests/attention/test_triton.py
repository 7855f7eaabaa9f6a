"""The Triton kernels where there is no GPU: interpreted, and compiled ahead of time.

Both need a process of their own: `TRITON_INTERPRET` is read when triton is imported.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenweights import TokenWeightsError, attention_entropy
from tokenweights.attention.statistics import Logits
from tokenweights.attention.triton_configuration import triton_refusal
from tokenweights.attention.triton_work import (
    item_table,
    part_span,
    result_starts,
    row_counts,
    unit_table,
    widths,
    with_sum_rows,
    workspace_chunks,
)

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


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="triton compiles on Linux only")


@with_triton
@linux_only
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_shipped_configurations_fit_the_device(arch):
    """No local memory, shared memory within the limit and lean loops, read from the binaries."""
    run = finished(["benchmarks/kernels/compiled.py", "--json", "--arch", str(arch)])
    assert run.returncode == 0, run.stderr[-3000:]
    records = json.loads(run.stdout)
    assert {record["kernel"] for record in records} == {"log_sum_exp", "mean_weights", "selections"}
    hold_to_bounds(records, arch)


@linux_only
@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_usual_kernels_fit_the_devices_under_other_versions_of_triton(tmp_path, version):
    """Of the oldest and the newest torch that we know, whose own triton this one is not."""
    folder = tmp_path / "triton"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(folder)]
    installed = finished(["-m", "pip", "install", *options, f"triton=={version}"])
    try:
        if "No matching distribution found for triton" in installed.stderr:
            reason = f"no package index that has triton {version} can be reached"
            pytest.fail(reason) if os.environ.get("REQUIRE_INDEX") else pytest.skip(reason)
        assert installed.returncode == 0, installed.stderr[-3000:]
        run = finished(
            ["benchmarks/kernels/compiled.py", "--json", "--usual", "--arch", "80", "90", "100"],
            PYTHONPATH=os.pathsep.join([str(folder), str(ROOT)]),
            # From 3.9 on, products and sums are fused only where this asks for it.
            TRITON_DEFAULT_FP_FUSION="1",
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a gigabyte
    assert run.returncode == 0, run.stderr[-3000:]
    records = json.loads(run.stdout)
    assert {record["triton"] for record in records} == {version}
    for arch in (80, 90, 100):
        hold_to_bounds([record for record in records if record["arch"] == arch], arch)


def hold_to_bounds(records, arch):
    """No local memory, shared memory within the limit, tensor cores, and lean loops."""
    limit = {80: 166912, 90: 232448, 100: 232448}[arch]
    for record in records:
        assert record["registers"] > 0
        assert record["stack"] == 0 and record["local"] == 0, record
        assert record["shared"] <= limit and record["blocks"] >= 1, record
    half = [r for r in records if r["kernel"] != "selections" and "fp32" not in r["note"]]
    products = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
    assert {record["product"] for record in half} == {products[arch]}
    # Of the layer of an 8B model: log-sum-exp, and entropy alone. Exponential, scaling and sum of
    # a score are three of them; log-sum-exp needs a maximum too.
    first, entropy = (
        next(r for r in half if r["note"].startswith(start))
        for start in ("D=128 ", "entropy D=128 ")
    )
    assert first["kernel"] == "log_sum_exp"
    bounds = {80: (12.0, 10.0), 90: (6.0, 5.0), 100: (6.0, 5.0)}[arch]
    assert first["per_score"] <= bounds[0] and entropy["per_score"] <= bounds[1]
    if arch == 90:
        assert first["blocks"] >= 2 and entropy["blocks"] >= 2
        # Exponentials of one head stand between the product of the next one and the wait for it.
        assert entropy["overlap"] == 0
        assert next(r for r in half if "overlapped" in r["note"])["overlap"] >= 0.25


@with_triton
def test_the_whole_report_runs_at_toy_size(tmp_path):
    """Agreement, tile sizes, times, tables and figures, as one command does them on a GPU."""
    results = tmp_path / "RESULTS.md"
    results.write_text("before\n<!-- report: begin -->\nold\n<!-- report: end -->\nafter\n")
    options = ["--device", "cpu", "--toy", "--all", "--tokens", "40", "--output", str(tmp_path)]
    options += ["--record", str(results), "--cases", "nothing_asked or number_of_selected"]
    names = ["--only", "entropy", "all statistics", "eager", "attention forward"]
    run = finished(["-W", "ignore", "benchmarks/kernels/report.py", *options, *names])
    assert run.returncode == 0, run.stderr[-3000:]
    agreement, tuning, times = (
        json.loads((tmp_path / f"{step}.json").read_text())
        for step in ("agreement", "tuning", "results")
    )
    assert agreement == {"passed": 5, "failed": 0, "skipped": 0}
    roles = {"weights", "sums", "denominators", "columns"}
    assert {record["role"] for record in tuning} == roles
    assert all(record["ms"] for record in tuning)
    times = {record["name"]: record for record in times}
    assert times["entropy, lse given"]["of_floor"] > 0
    assert times["attention forward, SDPA flash"]["p50"] > 0
    assert times["attention forward, SDPA cuDNN"]["missing"] == "not available here"
    text = results.read_text()
    assert text == (tmp_path / "results.md").read_text().join(
        ("before\n<!-- report: begin -->\n\n", "\n<!-- report: end -->\nafter\n")
    )
    ours, flash = (times[n]["p50"] for n in ("entropy, lse given", "attention forward, SDPA flash"))
    assert f"| 40 | {ours / flash:.2f} |" in text and "| 40 | entropy |" in text
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
    sequences = torch.tensor([[0, 0, 100, 0, 300], [1, 0, 100, 0, 100]], dtype=torch.int32)
    units = unit_table(sequences, Logits(1.0), rows=16, out_heads=2)
    bound, found = 40_000, 0
    for chunk, size in workspace_chunks(units, 64, bound):
        assert 4 * size <= bound
        used = torch.zeros(size, dtype=torch.int32)
        for _, first, stop, start, end, _, _, place, width, _ in chunk.tolist():
            for row in range(stop - first):
                used[place + start + row * width : place + row * width + end] += 1
                found += end - start
        assert int(used.max()) == 1
    assert found == sum((u[2] - u[1]) * (u[4] - u[3]) for u in units.tolist())


def test_the_rows_of_a_chunk_have_places_of_their_own():
    sequences = torch.tensor([[0, 0, 100, 0, 300], [1, 3, 97, 0, 100]], dtype=torch.int32)
    units = unit_table(sequences, Logits(1.0), rows=16, out_heads=2)
    starts, counts = result_starts(units, sequences, 100, 200), row_counts(units)
    seen = torch.zeros(400, dtype=torch.int32)
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        seen[start : start + count] += 1
    # Slots 0 to 2 of the second batch row hold no query; both output heads have all rows.
    expected = torch.ones(200, dtype=torch.int32)
    expected[100:103] = 0
    assert torch.equal(seen, expected.repeat(2))
    items = item_table(with_sum_rows(units, starts), 64)
    assert set(items[:, -1].tolist()) == set(starts.tolist())


@pytest.mark.parametrize("tokens", [16384, 32768, 131072])
def test_every_chunk_of_a_long_sequence_fills_a_device(tokens):
    units = unit_table(torch.tensor([[0, 0, tokens, 0, tokens]]).int(), Logits(1.0), rows=64)
    for chunk, size in workspace_chunks(units, 64, 2**28):
        longest = int(widths(chunk).max())
        parts = len(item_table(chunk, part_span(chunk, 64, longest)))
        full = size > 2**25  # the last chunks of a causal sequence are small
        assert parts >= 132 or not full
