"""`report` on the directories that the adapters leave behind, whole and damaged."""

import json
import random
import re
import subprocess
import sys

import pytest

from tokenweights.__main__ import main
from tokenweights.report import (
    TokenRecord,
    append_metrics,
    append_token_records,
    run_from_directory,
)

RECORD = TokenRecord(
    step=0,
    sample_id=1,
    prompt="1+1=",
    tokens=("2", "."),
    token_ids=(5, 9),
    attention_entropy=(0.8, 0.3),
    layer=2,
    entropy_kind="normalized",
    alignment="deciding",
    predictive_entropy=(0.5, 0.1),
)


@pytest.fixture
def folder(tmp_path):
    for step in range(3):
        append_metrics(tmp_path / "metrics.jsonl", {"step": step, "reward": step / 2})
    append_token_records(tmp_path / "tokens.jsonl", [RECORD])
    ratios = {f"gradient/decile_{number}": 0.1 for number in range(10)}
    append_metrics(
        tmp_path / "gradient.jsonl", {"step": 1, "gradient/anchor_cosine": 0.7, **ratios}
    )
    return tmp_path


def page_of(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_a_directory_becomes_one_page(folder, capsys):
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "read   3 steps, 0 evaluations, 1 gradient probes, 1 responses" in printed.out
    assert "reading token records" in printed.err and "drawing: 100%" in printed.err
    page = page_of(folder)
    for title in ("Learning", "Gradient geometry", "Gradient by entropy decile", "Two entropies"):
        assert f"<h2>{title}</h2>" in page
    assert "Could not be read" not in page


def test_probes_among_the_metrics_are_counted(folder, capsys):
    probes = (folder / "gradient.jsonl").read_text(encoding="utf-8")
    (folder / "gradient.jsonl").unlink()
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(probes)
    assert main(["report", str(folder)]) == 0
    assert "read   3 steps, 0 evaluations, 1 gradient probes" in capsys.readouterr().out


def test_damaged_files_are_told_and_the_rest_is_shown(folder, capsys):
    tokens = folder / "tokens.jsonl"
    tokens.write_bytes(tokens.read_bytes()[:-20] + b"\n\xff\n")
    append_token_records(tokens, [RECORD])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    (folder / "run.json").write_text("{")
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "read   3 steps" in printed.out and "1 responses" in printed.out
    assert "4 could not be read" in printed.err
    page = page_of(folder)
    assert "left out: 4" in page
    for place in ("tokens.jsonl:1", "tokens.jsonl:2", "metrics.jsonl:4", "run.json"):
        assert place in printed.err and place in page


def test_the_state_of_a_transformers_trainer_will_do(tmp_path, capsys):
    def state(step):
        history = [{"step": s, "reward": float(s), "epoch": 0.1} for s in range(1, step + 1)]
        history.append({"step": step, "train_runtime": 1.0, "note": "text", "loss": float("nan")})
        return json.dumps({"global_step": step, "log_history": history})

    for name, step in (("checkpoint-2", 2), ("checkpoint-10", 10), ("old", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(state(step))
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"global_step": 11, "log')
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "new" / "page.html")]) == 0
    assert "read   10 steps" in capsys.readouterr().out
    page = (tmp_path / "new" / "page.html").read_text()
    assert "checkpoint-11" in page and "left out: 1" in page
    assert "Training reward" in page and "mean over 1 steps" not in page


def test_what_verl_calls_reward_length_and_accuracy_is_understood(tmp_path):
    for step in range(4):
        line = {"step": step, "critic/rewards/mean": 0.1 * step, "response_length/mean": 50 + step}
        if step % 2:
            line["val-core/math/acc/mean@8"] = 0.1 * step
        append_metrics(tmp_path / "metrics.jsonl", line)
    assert main(["report", str(tmp_path)]) == 0
    page = page_of(tmp_path)
    assert "math/acc/mean@8" in page and "Too early to judge" in page and "4 steps" in page


def test_a_collapse_is_said(tmp_path):
    for step in range(60):
        length, reward = (40, -1.0) if step >= 40 else (400, 0.0)
        line = {"step": step, "reward": reward, "completions/mean_length": length}
        append_metrics(tmp_path / "metrics.jsonl", line)
    assert main(["report", str(tmp_path)]) == 0
    assert "short response collapse, raised at step" in page_of(tmp_path)


@pytest.mark.parametrize("missing", [True, False])
def test_a_directory_that_is_no_run_is_refused(missing, tmp_path, capsys):
    folder = tmp_path / "missing" if missing else tmp_path
    assert main(["report", str(folder)]) == 2
    words = "that exists" if missing else "metrics.jsonl"
    assert words in capsys.readouterr().err


def test_much_damage_beside_one_line_still_gives_a_page(tmp_path, capsys):
    (tmp_path / "tokens.jsonl").write_bytes(b"\x00\x01\n" * 30)
    append_metrics(tmp_path / "metrics.jsonl", {"step": 0, "reward": 0.5})
    assert main(["report", str(tmp_path)]) == 0
    assert "30 could not be read" in capsys.readouterr().err
    assert "and 10 more" in page_of(tmp_path)


NOISE = bytes(random.Random(0).randbytes(500))
CUT = "A run that was stopped while writing"
NOTHING = {
    "an empty file": ({"metrics.jsonl": b""}, "Append metrics while the run trains."),
    "blank lines": ({"metrics.jsonl": b"\n \n"}, "Append metrics while the run trains."),
    "half a line": ({"metrics.jsonl": b'{"step": 0, "rew'}, CUT),
    "no line of metrics": ({"metrics.jsonl": b'[1]\n{"reward": 1}\n'}, "2 could not be read, the"),
    "bytes": ({"metrics.jsonl": NOISE}, "no text"),
    "bytes of two files": ({"tokens.jsonl": NOISE, "gradient.jsonl": NOISE}, "no text"),
    "a description alone": ({"run.json": b'{"title": "x"}', "metrics.jsonl": b""}, "Append"),
    "a state without a log": (
        {"trainer_state.json": b'{"global_step": 0, "log_history": []}'},
        "Append metrics",
    ),
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_run_of_which_nothing_can_be_read_is_refused(case, tmp_path, capsys):
    files, words = NOTHING[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert main(["report", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    said = printed.err.split("\r")[-1].splitlines()[-1]
    condition = (
        "with a readable line in metrics.jsonl, trainer_state.json, tokens.jsonl or gradient.jsonl"
    )
    assert f"`report`: expected `RUN_DIR` {condition}, got none in {tmp_path}. " in said
    assert words in said and not (words == "no text" and CUT in said)
    assert printed.out == "" and not (tmp_path / "report.html").exists()
    if "tokens.jsonl" not in files:  # whose reading has a bar
        assert printed.err.count("\n") == 1


@pytest.mark.parametrize("place", ["folder", "folder/metrics.jsonl/x.html"])
def test_a_page_that_cannot_be_written_is_refused_first(place, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "folder").mkdir()
    (folder / "folder" / "metrics.jsonl").touch()
    assert main(["report", ".", "--output", place]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert f"`report`: expected `--output` a file, got {place}" in printed.err
    (folder / "report.html").mkdir()
    assert main(["report", "."]) == 2
    assert "expected `--output` a file, got report.html" in capsys.readouterr().err


def test_a_missing_extra_is_named(folder):
    code = (
        "import sys; sys.modules['matplotlib'] = None; from tokenweights.__main__ import main; "
        f"sys.exit(main(['report', {str(folder)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install 'tokenweights[report]'" in done.stderr


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (19, "Too early to judge whether the run is collapsing: 19 steps"),
        (20, "No collapse up to step 19, .*; slow declines are judged from 90 steps on"),
        (90, r"No collapse up to step 89, [^,]*thresholds\."),
    ],
)
def test_no_verdict_is_given_before_one_can_be(steps, words, tmp_path):
    for step in range(steps):
        line = {"step": step, "reward": 0.0, "completions/mean_length": 400}
        append_metrics(tmp_path / "metrics.jsonl", line)
    assert main(["report", str(tmp_path)]) == 0
    assert re.search(words, page_of(tmp_path))


def test_lines_of_one_step_are_one(tmp_path):
    for line in ({"reward": 0.25}, {"eval_reward": 0.5}, {"train_runtime": 9.0}):
        append_metrics(tmp_path / "metrics.jsonl", {"step": 7, **line})
    (merged,) = run_from_directory(tmp_path).metrics
    assert merged == {"step": 7, "reward": 0.25, "eval_reward": 0.5, "train_runtime": 9.0}
