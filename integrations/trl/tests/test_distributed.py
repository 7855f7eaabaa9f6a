"""Two ranks train exactly as one rank does on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
LOW2HIGH = {"name": "low2high", "warmup_steps": 4, "temperature": 0.2}
CASES = {
    "low2high, from the generation": {"recipe": LOW2HIGH},
    "low2high, from the old log-prob pass": {
        "recipe": LOW2HIGH,
        "num_iterations": 2,
        "max_steps": 4,
    },
    "low2high, from a scoring pass": {"recipe": {**LOW2HIGH, "alignment": "own"}},
    "anchor20 over the selected tokens": {"recipe": "anchor20"},
    "weights over their sum": {"recipe": {**LOW2HIGH, "denominator": "weight_sum"}},
    "random20": {"recipe": "random20"},
}


def outcomes(folder: Path) -> list[dict]:
    """What came out of all cases on one rank, and on two: two launches, as they take long."""
    results = []
    paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    for ranks in (1, 2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        path = folder / f"{ranks}.json"
        done = subprocess.run(
            [
                *(sys.executable, *(torchrun if ranks > 1 else [])),
                *(str(TESTS / "distributed_run.py"), str(path), json.dumps(CASES)),
            ],
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        results.append(json.loads(path.read_text()))
    return results


def close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-5 * max(1.0, abs(a))


def test_two_ranks_agree_with_one(tmp_path):
    one, two = outcomes(tmp_path)
    assert one.keys() == two.keys() == CASES.keys()
    for case in CASES:
        agree(case, one[case], two[case])


def agree(case: str, one: dict, two: dict) -> None:
    assert one["source"] == two["source"]
    assert two["spread"] == 0.0
    assert len(one["history"]) == len(two["history"]) >= 2
    assert any("token_weights/weight_mean" in entry for entry in one["history"])
    for alone, shared in zip(one["history"], two["history"], strict=True):
        assert alone.keys() == shared.keys()
        # Not TRL's entropy and clip ratios: those are means of means over micro-batches.
        names = {name for name in alone if name.startswith("token_weights/")}
        for name in names | {"loss", "grad_norm"}:
            assert close(float(alone[name]), float(shared[name])), (case, name)
    pairs = zip(one["parameters"], two["parameters"], strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1e-5, case
    if two["source"] != "none":
        # The ranks' own extrema differ, so weights made from those would not agree.
        low, high = zip(*two["extrema"], strict=True)
        assert low[0] != low[1] and high[0] != high[1]
