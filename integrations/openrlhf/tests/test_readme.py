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
# Nodes of eight GPUs.
EXPERIMENTS = {
    "qwen3_8b_base": 4,
    "qwen3_8b_base_selective": 2,
    "qwen3_14b_base": 4,
    "qwen2_5_7b": 4,
}
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
    environment = os.environ | {
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


@pytest.mark.parametrize(("experiment", "nodes"), EXPERIMENTS.items())
def test_every_recipe_of_every_experiment_is_accepted(experiment, nodes, tmp_path):
    result, lines = started("../every_recipe.sh", tmp_path, "openrlhf", experiment, PROMPTS="48000")
    assert result.returncode == 0, result.stderr
    assert len(lines) > 1
    for dash_m, module, *words in lines:
        assert (dash_m, module) == ("-m", "tokenweights_openrlhf.train")
        made = accepted(words)
        used = made.tokenweights.token_recipe
        assert used == recipe(used.name) and used.name in recipe_names(source="paper")
        has_entropy = used.attention is not None
        assert (made.tokenweights.token_records is not None) == has_entropy
        assert (made.algo.kl.init_coef, made.rollout.top_p) == (0, 0.95)
        assert made.vllm.num_engines * made.vllm.tensor_parallel_size == nodes * 8
        assert made.actor.num_nodes == nodes
        # What is not given on the command line, and VeRL's configuration says.
        assert (made.actor.adam.eps, made.actor.entropy_coef, made.algo.kl.use_loss) == (
            *(1e-8, None, False),
        )
        assert not made.algo.dynamic_filtering_enable
        updates = made.rollout.batch_size * made.rollout.n_samples_per_prompt
        assert updates // made.train.batch_size == 16


@pytest.mark.parametrize("name", ["entropy_bonus", "sampler_ratio_band", "second_moment_drop"])
def test_recipes_of_the_field_are_accepted(name, tmp_path):
    _, lines = started("examples/paper.sh", tmp_path, "qwen3_8b_base", name, PROMPTS="48000")
    ((_, _, *words),) = lines
    made = accepted(words)
    assert made.tokenweights.token_records is None
    corrected = made.algo.advantage.is_correction_level != "off"
    assert corrected == ("sampler_log_probs" in recipe(name).columns)


def test_a_launch_script_says_what_is_missing(tmp_path):
    for words, variables, message in (
        ((), {}, "name an experiment"),
        (("qwen3_8b_base",), {}, "name a recipe"),
        (("qwen3_8b_base", "low2high"), {"DATA": "here"}, "no here/deepscaler.parquet. Run"),
        (("qwen3", "low2high"), {"PROMPTS": "48000"}, "no experiment named qwen3"),
    ):
        result, lines = started("examples/paper.sh", tmp_path, *words, **variables)
        assert result.returncode != 0 and not lines
        assert message in result.stderr


@pytest.mark.parametrize("script", ["examples/paper.sh", "../every_recipe.sh"])
def test_a_dry_run_prints_what_would_start(script, tmp_path):
    words = ["qwen2_5_7b", "low2high"] if "paper" in script else ["openrlhf", "qwen2_5_7b"]
    words += ["--logger.wandb.project", "two words"]
    _, lines = started(script, tmp_path, *words, PROMPTS="48000")
    (tmp_path / "commands").unlink()
    result, none = started(script, tmp_path, *words, PROMPTS="48000", DRY_RUN="1")
    assert lines and not none
    assert [shlex.split(line) for line in result.stdout.splitlines()] == [
        ["python", *line] for line in lines
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder as `prepare_data.py` writes it, of made-up questions."""
    import runpy

    from datasets import Dataset

    script = runpy.run_path(str(ADAPTER.parent / "prepare_data.py"))
    folder = tmp_path_factory.mktemp("data")
    places = []
    for number, (name, source) in enumerate(script["SOURCES"].items()):
        rows = []
        for index in range(100 + number):
            row = {}
            for path, value in (
                (source.question, f"{name} {index}?"),
                (source.answer, rf"\boxed{{{index}}}" if source.boxed else str(index)),
            ):
                *above, last = path.split(".")
                node = row
                for key in above:
                    node = node.setdefault(key, {})
                node[last] = value
            rows.append(row)
        Dataset.from_list(rows).to_parquet(folder / f"{name}.source.parquet")
        places += ["--source", f"{name}={folder / name}.source.parquet"]
    with redirect_stdout(io.StringIO()):
        script["main"]([str(folder), *places])
    return folder


@pytest.mark.parametrize(
    ("experiment", "questions", "episodes"),
    [("qwen3_8b_base", 201, 3), ("qwen3_8b_base_selective", 81, 5)],
)
def test_openrlhf_reads_the_prepared_data(prepared, experiment, questions, episodes, tmp_path):
    from types import SimpleNamespace

    from openrlhf.trainer.ppo_trainer import prepare_datasets

    result, lines = started("examples/paper.sh", tmp_path, experiment, "full", DATA=str(prepared))
    assert result.returncode == 0, result.stderr
    ((_, _, *words),) = lines
    made = accepted(words)
    assert made.train.num_episodes == episodes
    # The share of warm-up is made of the number of questions in the files.
    assert made.actor.lr_warmup_ratio == pytest.approx(10 * 512 / (questions * episodes), rel=1e-4)
    loaders = []

    def loader(dataset, *_, **__):
        loaders.append(dataset)
        return dataset

    strategy = SimpleNamespace(
        args=made, print=print, is_rank_0=lambda: False, setup_dataloader=loader
    )
    tokenizer = SimpleNamespace(apply_chat_template=lambda chat, **_: chat[-1]["content"])
    prepare_datasets(strategy, tokenizer)
    train, evaluation = loaders
    assert len(train) == questions
    name, prompt, label, _ = train[0]
    assert prompt.startswith(f"{name} {label}?\n") and "boxed" in prompt
    assert {evaluation[index][0] for index in range(len(evaluation))} == {
        *("aime_2024", "olympiadbench", "minerva", "math")
    }


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
