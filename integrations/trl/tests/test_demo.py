"""The demo runs from its command line and leaves everything it names."""

import subprocess
import sys
from pathlib import Path

import pytest
from tokenweights.report import read_metrics, read_token_records

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"
FILES = ("report.html", "learning.png", "dynamics.png", "weights.png", "run.json")


def demo(*options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, DEMO, "--held-out", 2, *options]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def test_the_demo_leaves_a_report(tmp_path):
    for _ in range(2):  # a second run starts afresh in the same folder
        done = demo("--steps", 2, "--output", tmp_path)
        assert done.returncode == 0, done.stderr
        assert "report.html" in done.stdout
        assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
        assert [line["step"] for line in read_metrics(tmp_path / "evaluations.jsonl")] == [0, 2]
        records = list(read_token_records(tmp_path / "tokens.jsonl"))
        assert {record.step for record in records} == {0, 1}
        assert all((tmp_path / name).stat().st_size > 0 for name in FILES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--recipe", "low2hihg"), "Did you mean 'low2high'"),
        (("--steps", "0"), "at least 1"),
    ],
)
def test_nonsense_is_refused_before_anything_is_loaded(tmp_path, options, words):
    done = demo(*options, "--output", tmp_path / "run")
    assert done.returncode == 2 and words in done.stderr
    assert not (tmp_path / "run").exists()
