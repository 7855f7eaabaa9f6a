"""A script of the tests on the ranks of torchrun, or alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def outcome(script: str, ranks: int, path: Path, asked: Any) -> Any:
    """What the script writes to a JSON file, given the file and JSON of what is asked for."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    paths = [str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [
            *(sys.executable, *(torchrun if ranks > 1 else [])),
            *(str(TESTS / script), str(path), json.dumps(asked)),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())
