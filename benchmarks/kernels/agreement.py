"""What has to hold before anything is timed: agreement with the float64 reference."""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import torch
from contenders import HORIZON
from torch import Tensor

from tokenweights import attention_entropy, attention_received, attention_statistics

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
CHECKED_ROWS = 4
# More than the horizon that is timed.
COLUMN_ROWS = 64


def kernel_cases(device: str, *, only: str | None, file: str = "triton_cases.py") -> dict[str, int]:
    """The kernels' own test cases on the device: every kernel, type and layout.

    On a CPU they run in Triton's interpreter. Each needs kernels of its own, which are compiled in
    several processes on a GPU.

    Args:
        device: `cpu` or `cuda`.
        only: pytest's `-k`; None for all.
        file: Of `tests/attention`; those of attention received lie apart.

    Returns:
        How many passed, failed and were skipped.
    """
    environment = {k: v for k, v in os.environ.items() if "PYTEST" not in k}
    environment["TRITON_CASES_DEVICE"] = device
    environment.pop("TRITON_INTERPRET", None)
    processes = "4"
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
        processes = "0"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "cases.xml"
        options = ["-q", "-p", "no:cacheprovider", f"-n{processes}", f"--junitxml={report}"]
        if only is not None:
            options += ["-k", only]
        command = [sys.executable, "-m", "pytest", f"tests/attention/{file}", *options]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"the kernels' cases did not run:\n{run.stdout}{run.stderr}")
        suite = next(ElementTree.parse(report).iter("testsuite"))
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    if failed or not total:
        print(run.stdout[-8000:], flush=True)
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def check_statistics(query: Tensor, key: Tensor, lse: Tensor, backend: str) -> None:
    """Every statistic of some rows, with the log-sum-exp given and computed."""
    everything = attention_statistics(query, key, backend=backend)
    given = attention_statistics(query, key, lse=lse, backend=backend)
    tokens = query.shape[2]
    for stop in sorted({tokens, tokens // 2 + 1, min(tokens, 130)}):
        rows = slice(max(stop - CHECKED_ROWS, 0), stop)
        wanted = attention_statistics(query[:, :, rows], key[:, :, :stop], backend="reference")
        for found in (everything, given):
            for kind, value in vars(wanted).items():
                if value is None:  # a statistic that has to be asked for
                    continue
                difference = (getattr(found, kind)[:, rows] - value).abs()
                if kind == "support_size":
                    assert int(difference.max()) <= 1, (kind, stop)
                else:
                    worst = float((difference / value.abs().clamp_min(1.0)).max())
                    assert worst <= TOLERANCE, (kind, stop, worst)


def check_entropy(name: str, function: Callable, query: Tensor, key: Tensor, lse: Tensor) -> None:
    """Another implementation's entropy; half-precision ones are coarse."""
    if name.startswith(("attention forward", "all statistics")):
        return
    if "received" in name:
        check_received(name, function, query, key, lse)
        return
    last = query[:, :, -CHECKED_ROWS:]
    wanted = attention_entropy(last, key, backend="reference")
    error = (function(query, key, lse)[:, -CHECKED_ROWS:] - wanted).abs().max()
    # Those that round scores to the input's type have its precision.
    limit = TOLERANCE if name.startswith("entropy") or query.dtype == torch.float32 else 5e-3
    assert float(error) <= limit, (name, float(error))


def check_received(name: str, function: Callable, query: Tensor, key: Tensor, lse: Tensor) -> None:
    """What the last keys receive, all of it from the last queries."""
    rows = slice(-min(query.shape[2], COLUMN_ROWS), None)
    horizon = HORIZON if "horizon" in name else (None, None)
    wanted = attention_received(query[:, :, rows], key, horizon=horizon, backend="reference")
    error = (function(query, key, lse) - wanted)[:, rows].abs().max()
    assert float(error) <= TOLERANCE, (name, float(error))
