"""Every command of the guide and the README composes, and the launch scripts run what they say."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tokenweights as tw
from configured import composed

from tokenweights_verl.config import token_weights_config

ADAPTER = Path(__file__).parents[1]
ROOT = ADAPTER.parents[1]
# The adapter's source distribution is this folder alone, without the site's pages.
GUIDES = [ROOT / "docs" / "guides" / "verl.md"] if (ROOT / "docs").is_dir() else []
PAGES = [ADAPTER / "README.md", *GUIDES]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
KNOWN = ("pip install", "ray start", "make test-verl", "bash ", "python ")


def commands():
    for page in PAGES:
        for language, text in FENCE.findall(page.read_text()):
            assert language == "bash", f"{page.name}: a block of {language or 'no language'}"
            text = re.sub(r"\s+#.*", "", text.replace("\\\n", " "))
            yield from (line for line in text.splitlines() if line.strip())


def checked(arguments):
    return token_weights_config(composed(*arguments)).token_recipe


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_is_one_that_works(command):
    assert command.startswith(KNOWN)
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "tokenweights_verl.train"]:
        checked(words[3:])
    elif words[0] in ("python", "bash"):
        assert (ROOT / words[1]).is_file()


@pytest.fixture
def recorded(tmp_path):
    """Runs a script with a `python` that writes down its arguments instead of training."""
    log = tmp_path / "commands"
    log.write_text("")
    stub = tmp_path / "python"
    stub.write_text(
        f"#!/bin/sh\ncase $1 in -m) printf '%s\\n' \"$*\" >> {log};; "
        f'*) exec {sys.executable} "$@";; esac\n'
    )
    stub.chmod(0o755)

    def run(script, *arguments):
        subprocess.run(
            ["bash", ADAPTER / script, *arguments],
            env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
            check=True,
        )
        lines = [line.split() for line in log.read_text().splitlines()]
        log.write_text("")
        assert all(line[:2] == ["-m", "tokenweights_verl.train"] for line in lines)
        return [line[2:] for line in lines]

    return run


def test_one_experiment(recorded):
    (arguments,) = recorded("examples/paper.sh", "qwen2_5_7b", "anchor20", "trainer.nnodes=2")
    assert checked(arguments) == tw.recipe("anchor20")
    config = composed(*arguments)
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen2.5-7B"
    assert (config.trainer.nnodes, config.ray_kwargs.ray_init.address) == (2, "auto")


@pytest.mark.parametrize(
    "experiment", ["qwen3_8b_base", "qwen3_8b_base_selective", "qwen3_14b_base", "qwen2_5_7b"]
)
def test_every_recipe_of_an_experiment_once(recorded, experiment):
    started = recorded("../every_recipe.sh", "verl", experiment)
    runs = [checked(arguments).name for arguments in started]
    assert len(set(runs)) == len(runs) and runs[0] == "full"
    named = [composed(*arguments).trainer.experiment_name for arguments in started]
    assert named == [f"{experiment}-{name}" for name in runs]


def test_the_papers_recipes_are_all_run(recorded):
    started = [
        checked(arguments)
        for experiment in ("qwen3_8b_base", "qwen3_8b_base_selective")
        for arguments in recorded("../every_recipe.sh", "verl", experiment)
    ]
    made = map(tw.recipe, tw.recipe_names(source="paper"))
    # Loss magnitude is the same for every token here; layer 20 is low2high's on this model.
    known = {r.name for r in made if "token_loss" not in r.columns} - {"low2high_layer20"}
    assert {r.name for r in started} == known
    assert tw.middle_layer(36) == 20


@pytest.mark.parametrize("script", ["examples/paper.sh", "../every_recipe.sh"])
def test_a_dry_run_prints_what_would_start(recorded, script, monkeypatch, capfd):
    words = ("qwen2_5_7b", "low2high") if "paper" in script else ("verl", "qwen2_5_7b")
    started = recorded(script, *words, "trainer.logger=[console]")
    monkeypatch.setenv("DRY_RUN", "1")
    assert recorded(script, *words, "trainer.logger=[console]") == []
    printed = [shlex.split(line) for line in capfd.readouterr().out.splitlines()]
    command = ["python", "-m", "tokenweights_verl.train"]
    assert printed == [[*command, *arguments] for arguments in started]


def test_a_script_without_arguments_says_what_it_wants():
    run = subprocess.run(
        ["bash", ADAPTER / "examples" / "paper.sh"], capture_output=True, text=True
    )
    assert run.returncode != 0 and "qwen3_14b_base" in run.stderr
