"""`compare` on run directories as trainers leave them behind, whole, odd and damaged."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenweights import recipe
from tokenweights.__main__ import main
from tokenweights.commands import compare
from tokenweights.report import append_metrics

COMMAND = [sys.executable, "-m", "tokenweights", "compare"]


def written(folder, rewards, *, weight=None):
    for step, reward in enumerate(rewards):
        line = {"step": step, "reward": reward}
        if weight is not None:
            line["token_weights/weight_mean"] = weight
            line["token_weights/effective_sample_size"] = weight / 2
        append_metrics(folder / "metrics.jsonl", line)
    return folder


@pytest.fixture
def folders(tmp_path):
    """Two seeds of two recipes in each of the ways that a run can be named."""
    described = {"recipe": recipe("low2high").describe(), "settings": {"seed": 0}}
    own = written(tmp_path / "mine", [0.5, 2.0], weight=0.5)
    (own / "run.json").write_text(json.dumps(described))
    return [
        written(tmp_path / "full-seed0", [0.0, 1.0]),
        written(tmp_path / "full" / "seed1", [0.0, 3.0]),
        own,
        written(tmp_path / "low2high-seed1", [0.5, 5.0, 7.0], weight=0.5),
    ]


def ran(*arguments, cwd):
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def refusal(capsys, *arguments):
    """What a command says that refuses its input and writes no page."""
    assert main(["compare", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_the_command_prints_a_table_and_writes_one_page(folders, tmp_path):
    done = ran(*folders, "-o", "new/page.html", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""  # no bar where there is no terminal
    lines = [re.split(r"  +", line.strip()) for line in done.stdout.splitlines()]
    assert ["read", "4 runs of 2 recipes, 2 common steps"] in lines
    assert ["full", "2", "2.000 [1.000, 3.000]", "1.000 [0.500, 1.500]", "-", "-"] in lines
    values = ["low2high", "2", "3.500 [2.000, 5.000]", "2.000 [1.250, 2.750]", "0.500", "0.250"]
    assert values in lines
    effect = ["low2high", "+1.500 [+1.000, +2.000]", "+1.000 [+0.750, +1.250]", "paired, 2 seeds"]
    assert effect in lines
    assert "2 steps they have in common" in done.stdout and "too narrow" in done.stdout
    heads, full, low2high = done.stdout.splitlines()[5:8]
    assert heads.index("final") == full.index("2.000 [") == low2high.index("3.500 [")
    assert os.listdir(tmp_path / "new") == ["page.html"]
    page = (tmp_path / "new/page.html").read_text(encoding="utf-8")
    assert "+1.500 [+1.000, +2.000]" in page and page.count("<svg") == 1


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.permutations(range(4)))
def test_the_order_of_the_directories_changes_nothing(folders, tmp_path, order):
    pages = []
    for places in (range(4), order):
        page = tmp_path / "page.html"
        assert main(["compare", *(str(folders[place]) for place in places), "-o", str(page)]) == 0
        pages.append(page.read_bytes())
    assert pages[0] == pages[1]


def test_metric_and_baseline_can_be_chosen(folders, tmp_path, capsys):
    for number, folder in enumerate(folders):
        append_metrics(folder / "evaluations.jsonl", {"step": 1, "accuracy/easy": number / 10})
    options = ["--metric", "accuracy/easy", "--baseline", "low2high", "-o", tmp_path / "c.html"]
    assert main(["compare", *map(str, [*folders, *options])]) == 0
    printed = capsys.readouterr().out
    assert "accuracy/easy, difference to low2high" in printed and "-0.200 [-0.200" in printed


def test_without_the_baseline_a_note_stands_for_the_effects(folders, tmp_path, capsys):
    arguments = [*folders[2:], "-o", tmp_path / "c.html"]
    assert main(["compare", *map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    assert "No run of the baseline full: effects are left out." in printed
    assert "difference" not in printed


def test_damaged_lines_are_told_and_left_out(folders, tmp_path, capsys):
    for _ in range(7):
        with (folders[0] / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "rew\n')
    assert main(["compare", *map(str, folders), "-o", str(tmp_path / "c.html")]) == 0
    printed = capsys.readouterr()
    assert "7 could not be read" in printed.err and "metrics.jsonl:3" in printed.err
    assert "and 2 more" in printed.err and "2 common steps" in printed.out


def test_the_state_of_a_transformers_trainer_will_do(folders, tmp_path, capsys):
    state = {"global_step": 1, "log_history": [{"step": s, "reward": 9.0} for s in (0, 1)]}
    place = tmp_path / "anchor20-seed0" / "checkpoint-1"
    place.mkdir(parents=True)
    (place / "trainer_state.json").write_text(json.dumps(state))
    arguments = [folders[0], place.parent, "-o", tmp_path / "c.html"]
    assert main(["compare", *map(str, arguments)]) == 0
    assert "9.000" in capsys.readouterr().out


NONSENSE = {
    "a missing folder": (["full-seed9"], "to be a directory"),
    "a file": (["full-seed0/metrics.jsonl"], "to be a directory"),
    "an empty metrics file": (["empty-seed0"], "no step"),
    "nothing but damage": (["broken-seed0"], "no step"),
    "a folder without a run": (["void-seed0"], "metrics.jsonl"),
    "a folder without a name": (["nameless"], "no recipe and seed"),
    "one run only": ([], "at least two, got 1"),
    "the same directory": (["full-seed0/"], "which are one"),
    "the same directory by a link": (["link-seed0"], "which are one"),
    "the same recipe and seed": (["full/seed0"], "full, seed 0, twice"),
    "an unknown metric": (["a-seed0", "--metric", "rewrad"], "Did you mean 'reward'?"),
    "no finite value": (["nan-seed0"], "none of them finite"),
    "a page that is a folder": (
        ["a-seed0", "-o", "void-seed0"],
        "`--output` a file, got void-seed0",
    ),
    "a page in a file": (
        ["a-seed0", "-o", "full-seed0/metrics.jsonl/x.html"],
        "`--output` a file, got full-seed0/metrics.jsonl/x.html",
    ),
    "a page that is a folder, before anything is read": (
        ["nowhere", "-o", "."],
        "`--output` a file",
    ),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused_in_words(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("full-seed0", "full/seed0", "a-seed0", "nameless"):
        written(tmp_path / name, [0.0, 1.0])
    written(tmp_path / "nan-seed0", [float("nan")] * 2)
    for name, text in (("empty-seed0", ""), ("broken-seed0", "\x00\n[1]\n{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    (tmp_path / "void-seed0").mkdir()
    (tmp_path / "link-seed0").symlink_to("full-seed0")
    arguments, words = NONSENSE[case]
    before = sorted(tmp_path.rglob("*"))
    assert words in refusal(capsys, "full-seed0", *arguments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("moment", ["comparison_html", "recipe_run_from_directory"])
def test_an_interrupt_leaves_the_old_page(moment, folders, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    page = tmp_path / "c.html"
    page.write_text("old")
    monkeypatch.setattr(compare, moment, interrupted)
    assert main(["compare", *map(str, folders), "-o", str(page)]) == 130
    assert page.read_text() == "old" and "interrupted" in capsys.readouterr().err


def test_an_interrupt_while_writing_leaves_no_part(tmp_path):
    class Page(type(tmp_path)):
        def write_text(self, data, **options):
            super().write_text(data, **options)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare._write(Page(tmp_path / "c.html"), "half")
    assert os.listdir(tmp_path) == []


def test_a_terminal_gets_a_bar(folders, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    arguments = [*COMMAND, *map(str, folders), "-o", str(tmp_path / "c.html")]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=theirs, check=False)
    os.close(theirs)
    shown = ""
    with contextlib.suppress(OSError):  # how a terminal that nobody writes to any more ends
        while part := os.read(ours, 1 << 16):
            shown += part.decode()
    os.close(ours)
    assert done.returncode == 0 and "reading" in shown and "runs/s" in shown


def test_hostile_names_do_not_steer_the_terminal(folders, tmp_path, capsys):
    own = written(tmp_path / "x", [0.0, 0.0])
    (own / "run.json").write_text(json.dumps({"recipe": "\x1b[31m<b>", "seed": 0}))
    page = tmp_path / "c.html"
    assert main(["compare", *map(str, folders), str(own), "-o", str(page)]) == 0
    assert "\x1b" not in capsys.readouterr().out and "<b>" not in page.read_text()


def test_help_says_where_recipe_and_seed_come_from():
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for word in ("RUN_DIR", "run.json", "RECIPE-seedN", "RECIPE/seedN", "--metric", "--baseline"):
        assert word in done.stdout
