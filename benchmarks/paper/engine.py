"""The engines of `integrations/loop`, which are examples to copy and no package."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

# The warm starts are files of this checkout: no hub is asked, and no bar is drawn for them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

ROOT = Path(__file__).parents[2]


def loaded(name: str) -> ModuleType:
    """A file of `integrations/loop` as a module, once for each process."""
    known = f"loop_{name}"
    if known not in sys.modules:
        path = ROOT / "integrations" / "loop" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(known, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[known] = module
        spec.loader.exec_module(module)
    return sys.modules[known]


fast = loaded("fast")
