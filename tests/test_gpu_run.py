"""The mechanics of the run on a strange GPU machine: kept parts, a budget, refused toys."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path  # its folder has modules with the names of ours, which ranks would take
    return module


step, results, figures = loaded("step"), loaded("results"), loaded("figures")
ABOUT = {"device": "some", "commit": "abc", "toy": False, "torch": "2", "triton": "3"}
ABOUT |= {"capability": "9.0"}
# Of no device: lengths times a number each, so that every name and number is told apart.
TOY = ABOUT | {"toy": True, "device": "x86_64"}
CONTENDERS = {
    "entropy, lse given": 1.0,
    "entropy": 1.5,
    "all statistics, lse given": 2.5,
    "received": 1.25,
    "eager, materialised": 20.0,
    "attention forward, SDPA flash": 2.0,
}


def toy_times():
    """Records of a step, as `times.py` leaves them."""
    return {
        f"{tokens} tokens": {
            "found": [
                {"name": name, "tokens": tokens, "peak_bytes": 1000 * tokens, "of_floor": 0.5}
                | {field: factor * tokens * 1e-6 for field in ("p20", "p50", "p80")}
                for name, factor in CONTENDERS.items()
            ]
            + [{"name": "torch.compile", "tokens": tokens, "missing": "not available here"}]
        }
        for tokens in (1024, 4096, 16384)
    }


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

    # What was missing may have been brought since.
    def refused():
        raise step.Missing("not here")

    assert step.take({"d": refused}, path, ABOUT, budget=60)
    assert step.take({"d": part("d")}, path, ABOUT, budget=60)
    assert calls.pop() == "d"
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
    modules = {path.stem for path in FOLDER.glob("*.py")} - {"step", "results", "figures"}
    assert modules == set(step.STEPS)


def test_results_of_a_toy_or_of_two_commits_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no results"):
        results.found_in(tmp_path)
    parts = {"16 tokens": {"found": [{"name": "entropy", "p50": 0.25}], "seconds": 1.0}}
    first, second = tmp_path / "probe.json", tmp_path / "capture.json"
    first.write_text(json.dumps({"about": ABOUT, "parts": parts}))
    text = "\n".join(results.lines_of(results.found_in(tmp_path)))
    assert "| 16 tokens, entropy | p50 0.25 |" in text and "commit abc" in text
    once = results.recorded("before\n", text.splitlines())
    assert results.recorded(once, text.splitlines()) == once and once.startswith("before\n")
    second.write_text(json.dumps({"about": ABOUT | {"commit": "def"}, "parts": parts}))
    with pytest.raises(SystemExit, match="several devices, commits or versions"):
        results.found_in(tmp_path)
    second.write_text(json.dumps({"about": ABOUT | {"toy": True}, "parts": parts}))
    with pytest.raises(SystemExit, match="toy results are no results: capture"):
        results.found_in(tmp_path)
    # What does not say that it was no toy, and what ran elsewhere than on a GPU.
    for removed, message in (("toy", "toy results"), ("capability", "results of no GPU")):
        about = {name: value for name, value in ABOUT.items() if name != removed}
        second.write_text(json.dumps({"about": about, "parts": parts}))
        with pytest.raises(SystemExit, match=f"{message} are no results: capture"):
            results.found_in(tmp_path)


def test_tables_hold_ratios_and_every_contender():
    tuning = {"16384 tokens": {"found": [{"role": "sums", "tiles": "a", "ms": 2.0}]}}
    steps = {"times": {"about": ABOUT, "parts": toy_times()}}
    text = results.lines_of(steps | {"tuning": {"about": ABOUT, "parts": tuning}})
    assert "| 4096 | 0.50 | 0.75 | 50 % | 2.50 | 4 | 4 |" in text
    assert "| 1024 | torch.compile | not available here | | | | |" in text
    assert "| 16384 | received | 20.480 | 20.480 | 20.480 | 16 | 50 % |" in text
    assert "| sums | a | 2.000 (fastest) |" in text


def test_figures_are_small_name_their_lines_and_follow_the_readers_light():
    drawn = figures.drawn({"times": {"about": TOY, "parts": toy_times()}})
    assert set(drawn) == {"gpu-times.svg", "gpu-memory.svg", "gpu-ratios.svg"}
    for name, text in drawn.items():
        root = ElementTree.fromstring(text)
        shown = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
        # Numbers of a toy say so wherever they are shown.
        assert figures.TOY in shown and len(text) < 20_000
        assert "prefers-color-scheme: dark" in text and {"1k", "4k", "16k"} <= shown
        names = set(CONTENDERS)
        if name == "gpu-ratios.svg":
            names -= {"eager, materialised", "attention forward, SDPA flash"}
        assert names <= shown and "torch.compile" not in shown
    times = {line.name: line for line in figures.lines(toy_times()["1024 tokens"]["found"], "p50")}
    assert times["entropy"].points == ((1024, pytest.approx(1.536e-3)),)
    ratios = figures.ratios(toy_times()["4096 tokens"]["found"], "attention forward, SDPA flash")
    assert {line.name: round(line.points[0][1], 6) for line in ratios}["entropy"] == 0.75
    assert "commit abc" in figures.drawn({"times": {"about": ABOUT, "parts": toy_times()}})[name]
    assert not figures.drawn({"probe": {"about": ABOUT, "parts": {}}})


def test_labels_that_would_touch_are_moved_apart():
    placed = figures.apart([100.0, 100.0, 325.0, 326.0], 14.0)
    assert placed == [100.0, 114.0, 306.0, 320.0]


@pytest.mark.parametrize("toy", [True, False])
def test_the_command_records_what_a_gpu_found_and_nothing_of_a_toy(tmp_path, toy):
    folder, target = tmp_path / "runs", tmp_path / "RESULTS.md"
    folder.mkdir()
    before = f"text\n\n{results.BEGIN}\nold\n{results.END}\nafter\n"
    target.write_text(before)
    about = TOY if toy else ABOUT
    (folder / "times.json").write_text(json.dumps({"about": about, "parts": toy_times()}))
    command = [sys.executable, str(FOLDER / "results.py"), str(folder), "--record", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if toy:
        assert done.returncode == 1 and "toy results are no results: times" in done.stderr
        assert target.read_text() == before and not (tmp_path / "figures").exists()
        return
    assert done.returncode == 0, done.stderr
    text = target.read_text()
    assert text.startswith("text\n") and text.endswith("\nafter\n") and "old" not in text
    for name in ("times", "memory", "ratios"):
        assert f"(figures/gpu-{name}.svg)" in text
        assert (tmp_path / "figures" / f"gpu-{name}.svg").stat().st_size > 1000


def test_the_recorded_results_are_of_no_gpu_yet_or_name_one():
    text = (FOLDER.parent / "kernels/RESULTS.md").read_text()
    between = text.partition(results.BEGIN)[2].partition(results.END)[0].strip()
    figures_there = list((FOLDER.parent / "kernels").glob("figures/gpu-*.svg"))
    assert between == "No run has been recorded." or "commit " in between.splitlines()[0]
    assert not figures_there or "commit " in between.splitlines()[0]
    assert figures.TOY not in "".join(path.read_text() for path in figures_there)


# What is carried to a machine that can fetch nothing.


def needed(requirements):
    """Names of requirements, without extras and other systems."""
    found = [Requirement(line) for line in requirements or ()]
    here = {"extra": "", "python_version": "3.12", "sys_platform": "linux"}
    return {canonicalize_name(r.name) for r in found if not r.marker or r.marker.evaluate(here)}


def brought_by(*names):
    """The distributions that come along with these."""
    found, waiting = set(), [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            try:
                waiting += needed(metadata.requires(name))
            except metadata.PackageNotFoundError:  # of a GPU's torch
                continue
    return found


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_what_is_carried_is_small_and_lacks_only_what_the_machine_has(tmp_path):
    command = ["make", "-s", "gpu-wheels", f"PYTHON={sys.executable}", f"WHEELS={tmp_path}/wheels"]
    done = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True)
    if "No matching distribution found" in done.stderr:
        reason = "no package index can be reached"
        pytest.fail(reason) if os.environ.get("REQUIRE_INDEX") else pytest.skip(reason)
    assert done.returncode == 0, done.stderr[-3000:]
    wheels = list((tmp_path / "wheels").glob("*.whl"))
    assert sum(wheel.stat().st_size for wheel in wheels) < 20 * 2**20
    carried = {canonicalize_name(wheel.name.split("-")[0]) for wheel in wheels}
    asked = (tmp_path / "wheels" / "carried.txt").read_text().split()
    assert carried == {canonicalize_name(name) for name in asked} and "trl" in carried
    makefile = (FOLDER.parents[1] / "Makefile").read_text()
    large = re.search(r"^LARGE := (.*)$", makefile, re.M).group(1).split()
    there = carried | brought_by("torch", "triton", "transformers", "numpy") | set(large)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as opened:
            (name,) = (n for n in opened.namelist() if n.endswith(".dist-info/METADATA"))
            requirements = Parser().parsestr(opened.read(name).decode()).get_all("Requires-Dist")
        assert needed(requirements) <= there, (wheel.name, needed(requirements) - there)
