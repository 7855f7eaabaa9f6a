"""What every benchmark records about the machine it ran on.

Run a suite with `pytest benchmarks/kernels -o addopts=--import-mode=importlib -s`; add
`--benchmark-json=results.json` to keep the numbers and what is recorded here.
"""

import os
import platform
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# Benchmarks and the report share `contenders.py`; all say what machine they ran on.
sys.path[:0] = [str(HERE / "kernels"), str(HERE)]

from machine import processor  # noqa: E402


@pytest.fixture(autouse=True)
def single_thread():
    """One CPU thread, so that the CPU time of the process is the cost of the function."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def recorded_environment(request, single_thread):
    """Machine, versions and thread count in the `extra_info` of a benchmark."""
    if "benchmark" in request.fixturenames:
        request.getfixturevalue("benchmark").extra_info.update(
            cpu=processor(),
            cores=os.cpu_count(),
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            python=platform.python_version(),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
        )
