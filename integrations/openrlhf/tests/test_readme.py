"""The code of README and guide runs, and every command in them and in the examples is accepted."""

import doctest
import io
import os
import re
import shlex
import stat
import subprocess
from contextlib import redirect_stdout

import pytest
import tiny
from tokenweights import boxed_match_reward

from tokenweights_openrlhf import TokenWeightsConfig, checked_arguments

ADAPTER = tiny.HERE.parent
PAGES = [ADAPTER / "README.md", ADAPTER.parents[1] / "docs/guides/openrlhf.md"]
EXAMPLES = sorted((ADAPTER / "examples").glob("*.sh"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def accepted(words):
    """OpenRLHF's arguments of a command line, if both parsers take it and no check refuses it."""
    stock, own, names = [], {}, iter(words)
    for word in names:
        if word.startswith("--tokenweights."):
            own[word.removeprefix("--tokenweights.")] = next(names)
        else:
            stock.append(word)
    for name in own.keys() & {"token_records_steps", "gradient_probe_steps"}:
        own[name] = int(own[name])
    return checked_arguments(tiny.parsed(*stock), TokenWeightsConfig(**own))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_and_print_what_follows(page):
    names, output = {"__name__": "__main__"}, ""
    for language, text in FENCE.findall(page.read_text()):
        if language == "python":
            with redirect_stdout(io.StringIO()) as printed:
                exec(text, names)
            output = printed.getvalue()
        elif language == "text":
            assert doctest.OutputChecker().check_output(text, output, 0), output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_accepted(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [text for language, text in FENCE.findall(page.read_text()) if language == "bash"]
    commands = [text for text in blocks if text.startswith("python -m tokenweights_openrlhf.train")]
    assert commands
    for text in commands:
        words = shlex.split(text.replace("\\\n", " "))[3:]
        made = accepted(words)
        assert made.tokenweights.token_recipe.name == "low2high"
        if made.reward.remote_url:
            assert (ADAPTER.parents[1] / made.reward.remote_url).exists()


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_launch_scripts_are_accepted(script, tmp_path):
    """The scripts run; what they would start is written down instead."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nprintf "%s\\0" "$@" >> "$COMMANDS"\nprintf "\\n" >> "$COMMANDS"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "COMMANDS": str(tmp_path / "commands"),
        "TRAIN": "train.jsonl",
    }
    subprocess.run([script], check=True, env=environment, cwd=tmp_path, timeout=60)
    lines = (tmp_path / "commands").read_text().split("\0\n")[:-1]
    assert len(lines) == (4 if "hard_masks" in script.name else 1)
    for line in lines:
        dash_m, module, *words = line.split("\0")
        assert (dash_m, module) == ("-m", "tokenweights_openrlhf.train")
        made = accepted([word.replace("runs/", f"{tmp_path}/runs/") for word in words])
        assert made.tokenweights.token_recipe.layers == (20,)
        assert (made.algo.kl.init_coef, made.rollout.top_p) == (0, 0.95)


def test_a_launch_script_without_data_says_what_is_missing(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRAIN"}
    result = subprocess.run(
        [EXAMPLES[-1]], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    assert "Set TRAIN to a JSONL file" in result.stderr


def test_the_example_reward_looks_at_the_response_only():
    import runpy

    reward_func = runpy.run_path(str(ADAPTER / "examples" / "boxed_reward.py"))["reward_func"]
    prompt = r"Answer in \boxed{}. 1+1="
    for response in (r"so \boxed{2}", r"\boxed{3}", "2"):
        made = reward_func([prompt + response], [prompt], ["2"])
        assert made["rewards"] == boxed_match_reward(response, "2")
        assert made["scores"] == float(response == r"so \boxed{2}")
