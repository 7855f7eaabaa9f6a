"""Settings that hold for every test of the repository."""

import importlib.util
import os

import pytest
import torch
from hypothesis import settings

# One thread: small tensors are many times faster without a thread pool. No deadline: a test never
# asserts wall-clock time.
torch.set_num_threads(1)
settings.register_profile("tokenweights", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("tokenweights")

# Doctests import every file; the kernels can be imported only where triton is installed.
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["tokenweights/attention/triton_*"]


@pytest.fixture(autouse=True)
def _seed(doctest_namespace: dict) -> None:
    torch.manual_seed(0)
    doctest_namespace["torch"] = torch
