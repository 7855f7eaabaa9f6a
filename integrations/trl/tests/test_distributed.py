"""Two ranks train exactly as one rank does on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LOW2HIGH = {"name": "low2high", "warmup_steps": 4, "temperature": 0.2}
CASES = {
    "low2high, from the generation": {"recipe": LOW2HIGH},
    "low2high, from the old log-prob pass": {"recipe": LOW2HIGH, "num_iterations": 2, "max_steps": 4},
    "anchor20 over the selected tokens": {
        "recipe": {"name": "anchor20", "denominator": "selected_tokens"}
    },
    "random20": {"recipe": "random20"},
}


def run(folder, ranks: int, changes: dict) -> dict:
    path = folder / f"{ranks}.json"
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    layout = {"per_device_train_batch_size": 4 // ranks, "gradient_accumulation_steps": 2}
    command = [*launcher, str(TESTS / "distributed_run.py"), str(path), json.dumps(layout | changes)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


def close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-5 * max(1.0, abs(a))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_agree_with_one(tmp_path, case):
    one, two = run(tmp_path, 1, CASES[case]), run(tmp_path, 2, CASES[case])
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["source"] == two["source"]
    assert two["spread"] == 0.0
    assert len(one["history"]) == len(two["history"]) >= 2
    for alone, shared in zip(one["history"], two["history"], strict=True):
        names = {name for name in alone if name.startswith("token_weights/")}
        assert names == {name for name in shared if name.startswith("token_weights/")}
        assert names or case.endswith("pass")
        for name in names | {"loss", "grad_norm", "completions/mean_length", "reward"}:
            assert close(alone[name], shared[name]), name
    difference = max(abs(a - b) for a, b in zip(one["parameters"], two["parameters"], strict=True))
    assert difference <= 1e-5
    if two["source"] != "none":
        # Neither rank holds both extrema, so weights from local extrema could not agree.
        low, high = zip(*two["extrema"], strict=True)
        assert low[0] != low[1] and high[0] != high[1]
