"""The mechanics of the run on a strange GPU machine: kept parts, a budget, refused toys."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


step, results = loaded("step"), loaded("results")
ABOUT = {"device": "some", "commit": "abc", "toy": False, "torch": "2", "triton": "3"}


def test_parts_are_kept_and_only_missing_and_failed_ones_run_again(tmp_path):
    calls, path = [], tmp_path / "times.json"

    def part(name, error=None):
        def run():
            calls.append(name)
            if error is not None:
                raise error
            return {"ms": 1.0}

        return run

    broken = {"a": part("a"), "b": part("b", ValueError("bad")), "c": part("c")}
    assert not step.take(broken, path, ABOUT, budget=60)
    # One failure stops none of the others.
    assert calls == ["a", "b", "c"]
    assert step.take({name: part(name) for name in "abc"}, path, ABOUT, budget=60)
    assert calls == ["a", "b", "c", "b"]
    # Another commit's results are not this one's.
    assert step.take({"a": part("a")}, path, ABOUT | {"commit": "def"}, budget=60)
    assert calls[4:] == ["a"]
    assert list(json.loads(path.read_text())["parts"]) == ["a"]


def test_a_spent_budget_starts_nothing_and_what_needs_a_device_says_so(tmp_path):
    path = tmp_path / "times.json"
    parts = {"a": lambda: pytest.fail("started")}
    assert not step.take(parts, path, ABOUT, budget=-1.0)
    assert not path.exists()

    def refused():
        raise step.Missing("needs a device: no interpreter")

    assert step.take({"a": refused}, path, ABOUT, budget=60)
    kept = json.loads(path.read_text())["parts"]["a"]
    assert kept["missing"] == "needs a device: no interpreter"


def test_every_step_has_a_module():
    modules = {path.stem for path in FOLDER.glob("*.py")} - {"step", "results"}
    assert modules == set(step.STEPS)


def test_results_of_a_toy_or_of_two_commits_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no results"):
        results.found_in(tmp_path)
    parts = {"16 tokens": {"found": [{"name": "entropy", "p50": 0.25}], "seconds": 1.0}}
    first, second = tmp_path / "times.json", tmp_path / "tuning.json"
    first.write_text(json.dumps({"about": ABOUT, "parts": parts}))
    text = "\n".join(results.lines_of(results.found_in(tmp_path)))
    assert "| 16 tokens, entropy | p50 0.25 |" in text and "commit abc" in text
    once = results.recorded("before\n", text.splitlines())
    assert results.recorded(once, text.splitlines()) == once and once.startswith("before\n")
    second.write_text(json.dumps({"about": ABOUT | {"commit": "def"}, "parts": parts}))
    with pytest.raises(SystemExit, match="several devices, commits or versions"):
        results.found_in(tmp_path)
    second.write_text(json.dumps({"about": ABOUT | {"toy": True}, "parts": parts}))
    with pytest.raises(SystemExit, match="toy results are no results: tuning"):
        results.found_in(tmp_path)
