"""The demo runs from its command line and leaves everything it names."""

import subprocess
import sys
from pathlib import Path

import pytest
from tokenweights.report import read_metrics, read_token_records, run_from_directory

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"
SECTIONS = (
    *("Learning", "Attention entropy", "Token weights", "Gradient geometry"),
    *("Gradient by entropy decile", "Two entropies", "Tokens by quadrant"),
    *("Where attention lies", "What single tokens looked at"),
)
FILES = ("report.html", "learning.png", "dynamics.png", "weights.png", "run.json")


def demo(*options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, DEMO, "--held-out", 2, *options]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def test_the_demo_leaves_a_report(tmp_path):
    for _ in range(2):  # a second run starts afresh in the same folder
        done = demo("--steps", 2, "--output", tmp_path)
        assert done.returncode == 0, done.stderr
        assert "report.html" in done.stdout
        steps = [line["step"] for line in run_from_directory(tmp_path).metrics]
        assert steps == [1, 2]
        assert [line["step"] for line in read_metrics(tmp_path / "evaluations.jsonl")] == [0, 2]
        records = list(read_token_records(tmp_path / "tokens.jsonl"))
        assert {record.step for record in records} == {0, 1}
        # Four prompts of eight responses, with rewards and with what their tokens attended to.
        assert len(records) == 64 and len({record.prompt for record in records}) == 8
        assert all(record.reward in (1.0, -1.0, -2.0) for record in records)
        assert all(record.attended and "local_mass_16" in record.columns for record in records)
        assert len(read_metrics(tmp_path / "gradient.jsonl")) >= 1
        assert all((tmp_path / name).stat().st_size > 0 for name in FILES)
        page = (tmp_path / "report.html").read_text()
        assert all(f"<h2>{title}</h2>" in page for title in SECTIONS)


def test_a_recipe_without_attention_names_what_it_wrote(tmp_path):
    demo("--steps", 1, "--output", tmp_path)
    done = demo("--steps", 1, "--output", tmp_path, "--recipe", "full")
    assert done.returncode == 0, done.stderr
    (also,) = (line for line in done.stdout.splitlines() if line.startswith("also "))
    named = also.removeprefix("also ").split(",")
    assert all((tmp_path / name.strip()).is_file() for name in named)
    assert not (tmp_path / "tokens.jsonl").exists() and "tokens.jsonl" not in also


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
