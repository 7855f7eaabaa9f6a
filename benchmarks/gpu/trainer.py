"""Ten steps of TRL's trainer with the embedded policy, where TRL was carried."""

import importlib.util
import subprocess
import sys
import time

from step import ROOT, Missing, Parts, Run


def parts(run: Run) -> Parts:
    """Seconds of the demonstration's ten steps."""
    return {"ten steps": lambda: steps(run)}


def steps(run: Run) -> dict[str, float]:
    """Of the demonstration, start and compilation included."""
    carried = [name for name in ("trl", "tokenweights_trl") if not importlib.util.find_spec(name)]
    if carried:
        raise Missing(f"not carried: {', '.join(carried)}")
    start = time.perf_counter()
    count = "1" if run.toy else "10"
    held_out = "4" if run.toy else "48"
    command = [sys.executable, "integrations/trl/examples/demo.py"]
    command += ["--steps", count, "--held-out", held_out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    return {"seconds": time.perf_counter() - start}
