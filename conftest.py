"""Settings that hold for every test of the repository."""

import atexit
import importlib.util
import os
import shutil
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings

# One thread: small tensors are many times faster without a thread pool. A test never asserts
# wall-clock time, and neither does hypothesis. Its draws are the same on every machine, so that
# what passed for us passes for everyone; what is random has a target of its own, `make fuzz`.
torch.set_num_threads(1)
TIMELESS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("tokenweights", derandomize=True, **TIMELESS)
# `make fuzz`: more draws, each round from a seed of its own, nothing kept.
settings.register_profile(
    "fuzz", derandomize=False, database=None, max_examples=200, print_blob=True, **TIMELESS
)
settings.load_profile("tokenweights")

# What torch compiles is this run's own: it would take what another setting of the processor left.
# Workers inherit the folder.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="tokenweights-compiled-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

# Doctests import every file; the kernels can be imported only where triton is installed.
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["tokenweights/attention/triton_*"]


@pytest.fixture(autouse=True)
def _seed(doctest_namespace: dict) -> None:
    torch.manual_seed(0)
    doctest_namespace["torch"] = torch
