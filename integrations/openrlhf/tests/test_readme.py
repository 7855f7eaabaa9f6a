"""The code of README and guide runs, and every command in them and in the examples is accepted."""

import doctest
import io
import os
import re
import shlex
import stat
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import tiny
from tokenweights import (
    TokenWeightsConfig,
    TokenWeightsError,
    boxed_match_reward,
    recipe,
    recipe_names,
)

from tokenweights_openrlhf import checked_arguments

ADAPTER = tiny.HERE.parent
GUIDES = ADAPTER.parents[1] / "docs/guides"
PAGES = [ADAPTER / "README.md", GUIDES / "openrlhf.md"]
# The recipes of their commands, in order; one is of a user's own.
RECIPES = [
    ["low2high"],
    ["low2high", "low2high", "sampler_ratio_truncated", "custom", "low2high"],
]
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


@pytest.mark.parametrize(("page", "recipes"), [*zip(PAGES, RECIPES, strict=True)], ids=str)
def test_commands_are_accepted(page, recipes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    _, own = next(iter(FENCE.findall((GUIDES / "your-own-rule.md").read_text())))
    (tmp_path / "my_rules.py").write_text(own)
    blocks = [text for language, text in FENCE.findall(page.read_text()) if language == "bash"]
    command, names = "python -m tokenweights_openrlhf.train", []
    for text in blocks:
        before, found, options = text.replace("\\\n", " ").partition(command)
        if not found or before not in ("", "PYTHONPATH=. "):
            continue
        made = accepted(shlex.split(options))
        names.append(made.tokenweights.token_recipe.name)
        if made.reward.remote_url:
            assert (ADAPTER.parents[1] / made.reward.remote_url).exists()
    assert names == recipes
    sys.modules.pop("my_rules", None)


def started(script, folder, *words, **variables):
    """Runs a script; what it would start is written down instead, and comes back, line by line."""
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\ncase $1 in -c) exec {shlex.quote(sys.executable)} "$@";; esac\n'
        'printf "%s\\0" "$@" >> "$COMMANDS"\nprintf "\\n" >> "$COMMANDS"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    environment = {name: value for name, value in os.environ.items() if name != "TRAIN"} | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "COMMANDS": str(folder / "commands"),
        **variables,
    }
    command = ["bash", ADAPTER / script, *words]
    result = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240
    )
    path = folder / "commands"
    lines = path.read_text().split("\0\n")[:-1] if path.exists() else []
    return result, [line.split("\0") for line in lines]


@pytest.mark.parametrize(
    ("experiment", "layers"), [("qwen3_8b_base", 36), ("qwen3_14b_base", 40), ("qwen2_5_7b", 28)]
)
def test_every_recipe_of_every_experiment_is_accepted(experiment, layers, tmp_path):
    result, lines = started(
        "../every_recipe.sh", tmp_path, "openrlhf", experiment, TRAIN="train.jsonl"
    )
    assert result.returncode == 0, result.stderr
    paper = recipe_names(source="paper")
    known = [name for name in paper if "token_loss" not in recipe(name).columns]
    names = [name for name in known if max(recipe(name).layers or [0]) < layers]
    assert len(lines) == len(names)
    for name, (dash_m, module, *words) in zip(names, lines, strict=True):
        assert (dash_m, module) == ("-m", "tokenweights_openrlhf.train")
        made = accepted(words)
        assert made.tokenweights.token_recipe == recipe(name)
        has_entropy = recipe(name).attention is not None
        assert (made.tokenweights.token_records is not None) == has_entropy
        assert (made.algo.kl.init_coef, made.rollout.top_p) == (0, 0.95)
        assert made.vllm.num_engines * made.vllm.tensor_parallel_size == 4 * 8


@pytest.mark.parametrize("name", ["entropy_bonus", "sampler_ratio_band", "second_moment_drop"])
def test_recipes_of_the_field_are_accepted(name, tmp_path):
    _, lines = started("examples/paper.sh", tmp_path, "qwen3_8b_base", name, TRAIN="train.jsonl")
    ((_, _, *words),) = lines
    made = accepted(words)
    assert made.tokenweights.token_records is None
    corrected = made.algo.advantage.is_correction_level != "off"
    assert corrected == ("sampler_log_probs" in recipe(name).columns)


def test_a_launch_script_says_what_is_missing(tmp_path):
    for words, variables, message in (
        ((), {}, "name an experiment"),
        (("qwen3_8b_base",), {}, "name a recipe"),
        (("qwen3_8b_base", "low2high"), {}, "Set TRAIN to a JSONL file"),
        (("qwen3", "low2high"), {"TRAIN": "train.jsonl"}, "no experiment named qwen3"),
    ):
        result, lines = started("examples/paper.sh", tmp_path, *words, **variables)
        assert result.returncode != 0 and not lines
        assert message in result.stderr


def test_the_example_reward_looks_at_the_response_only():
    import runpy

    reward_func = runpy.run_path(str(ADAPTER / "examples" / "boxed_reward.py"))["reward_func"]
    prompt = r"Answer in \boxed{}. 1+1="
    for response in (r"so \boxed{2}", r"\boxed{3}", "2"):
        made = reward_func([prompt + response], [prompt], ["2"])
        assert made["rewards"] == boxed_match_reward(response, "2")
        assert made["scores"] == float(response == r"so \boxed{2}")
        # A long prompt loses its beginning, perhaps in the middle of a character.
        for query in (prompt[9:] + response, "\N{REPLACEMENT CHARACTER}" + prompt[9:] + response):
            assert reward_func([query], [prompt], [2]) == made
            assert reward_func([query], [prompt], [2.0]) == made
    for label in ("", None, float("nan"), True):
        with pytest.raises(TokenWeightsError, match="`reference_answer`"):
            reward_func([prompt + r"\boxed{2}"], [prompt], [label])


def test_the_example_reward_finds_the_response_behind_any_cut_of_the_prompt():
    import runpy

    response = runpy.run_path(str(ADAPTER / "examples" / "boxed_reward.py"))["response"]
    for prompt in ("abcabcabd", "aaaa", "abab", "a\u00e9a\u00e9", "x"):
        for text in ("", "b", "abc", "bab", "z"):
            for cut in range(len(prompt)):
                query = prompt[cut:] + text
                if prompt in query:
                    continue
                # The longest end of the prompt that the query begins with.
                longest = next(at for at in range(cut + 1) if query.startswith(prompt[at:]))
                assert response(query, prompt) == query[len(prompt) - longest :]
