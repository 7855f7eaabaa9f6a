"""The fast engine of `integrations/loop`, which is an example to copy and no package."""

import importlib.util
import os
import sys
from pathlib import Path

# The warm starts are files of this checkout: no hub is asked, and no bar is drawn for them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

ROOT = Path(__file__).parents[2]
_PATH = ROOT / "integrations" / "loop" / "fast.py"
_NAME = "loop_fast"

if _NAME not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_NAME, _PATH)
    assert _spec is not None and _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[_NAME] = _module
    _spec.loader.exec_module(_module)

fast = sys.modules[_NAME]
