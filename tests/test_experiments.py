"""VeRL and OpenRLHF run the paper's experiments with the settings of docs/experiments.md."""

import os
import re
import shlex
import subprocess
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "experiments.md").read_text()
INTEGRATIONS = ROOT / "integrations"
CONFIGURATIONS = INTEGRATIONS / "verl/src/tokenweights_verl/configurations/experiment"
FAMILIES = {"full-data": "qwen3_8b_base", "selective": "qwen3_8b_base_selective"}
EXPERIMENTS = (*FAMILIES.values(), "qwen3_14b_base", "qwen2_5_7b")
RECIPE, PROMPTS = "low2high", 48_000
CODE = re.compile(r"`([^`]+)`")


class Setting(NamedTuple):
    name: str
    value: str
    source: str
    verl: str
    openrlhf: str


def table(*header: str) -> list[list[str]]:
    """The rows of every table of the page with these columns."""
    lines = iter(PAGE.splitlines())
    found = []
    for line in lines:
        if cells(line) == list(header):
            next(lines)
            found += map(cells, takewhile(lambda row: row.startswith("|"), lines))
    assert found, f"no table of {header}"
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []


def settings(family: str) -> list[Setting]:
    both = table("setting", "value", "from", "VeRL", "OpenRLHF")
    apart = table("setting", "selective", "full-data", "from", "VeRL", "OpenRLHF")
    column = {"selective": 1, "full-data": 2}[family]
    return [Setting(*row) for row in both] + [
        Setting(row[0], row[column], *row[3:]) for row in apart
    ]


def nested(path: Path) -> dict[str, Any]:
    """The leaves of a configuration and of those it is composed of, by key."""
    content = yaml.safe_load(path.read_text())
    made = {}
    for part in content.pop("defaults", ["_self_"]):
        made |= leaves(content) if part == "_self_" else nested(path.with_name(f"{part}.yaml"))
    return made


def leaves(node: dict[str, Any], above: str = "") -> dict[str, Any]:
    made = {}
    for key, value in node.items():
        made |= leaves(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return made


@cache
def verl(experiment: str) -> dict[str, str]:
    """What VeRL is given, as text."""
    made = nested(CONFIGURATIONS / f"{experiment}.yaml") | {"token_weights.recipe": RECIPE}

    def text(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(text, value))
        value = yaml.safe_dump(value).removesuffix("\n...\n").strip() if value is None else value
        value = str(value).lower() if isinstance(value, bool) else str(value)
        return re.sub(r"\$\{([\w.]+)\}", lambda match: text(made[match[1]]), value)

    return {key: text(value) for key, value in made.items() if key != "token_weights.recipe"}


@cache
def openrlhf(experiment: str) -> dict[str, str]:
    """What OpenRLHF is given, as text."""
    (command,) = dry_run("openrlhf/examples/paper.sh", experiment, RECIPE)
    assert command[:3] == ["python", "-m", "tokenweights_openrlhf.train"]
    made, option = {}, ""
    for word in command[3:]:
        if word.startswith("--"):
            option = word
            assert option not in made, f"{option} is given twice"
            made[option] = ""
        else:
            made[option] = f"{made[option]} {word.replace(f'{ROOT}/', '')}".strip()
    return {option: value or "true" for option, value in made.items()}


def dry_run(script: str, *words: str) -> list[list[str]]:
    """The commands that a script would start."""
    run = subprocess.run(
        ["bash", INTEGRATIONS / script, *words],
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1", "PROMPTS": str(PROMPTS)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(line) for line in run.stdout.splitlines()]


def same(one: str, other: str) -> bool:
    def parts(text: str) -> list[float | str]:
        return [number(word) for word in re.split(r"[,\s]+", text)]

    def number(word: str) -> float | str:
        try:
            return float(word)
        except ValueError:
            return word

    return parts(one) == parts(other)


def check(cell: str, value: str, given: dict[str, str], sign: str) -> None:
    """That a trainer is given what a cell of the page says, or that the cell gives a reason."""
    if cell.startswith(("always: ", "cannot: ")):
        return
    for code in CODE.findall(cell):
        name, _, own = code.partition(sign)
        if cell.startswith("no "):
            assert name not in given
        else:
            assert same(given[name], own or value), f"{name} is {given[name]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_both_trainers_are_given_what_the_page_says(family):
    experiment = FAMILIES[family]
    made = verl(experiment) | openrlhf(experiment)
    # What the page shows once, for the full-data experiment of 48,000 questions.
    shown = {"token_weights.metrics_file", "--tokenweights.metrics_file", "--actor.lr_warmup_ratio"}
    if family == "selective":
        full = verl(FAMILIES["full-data"]) | openrlhf(FAMILIES["full-data"])
        assert all(made[name] != full[name] for name in shown)
        made |= {name: full[name] for name in shown}
    for row in settings(family):
        check(row.verl, row.value, made, "=")
        check(row.openrlhf, row.value, made, " ")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_nothing_is_given_that_the_page_does_not_name(experiment):
    rows = [*settings("selective"), *map(lambda row: Setting("", "", "", *row), layout())]
    for given, column, sign in ((verl, "verl", "="), (openrlhf, "openrlhf", " ")):
        cells = [getattr(row, column) for row in rows]
        named = {
            code.partition(sign)[0]
            for cell in cells
            if not cell.startswith(("always: ", "cannot: ", "no "))
            for code in CODE.findall(cell)
        }
        assert set(given(experiment)) == named


def layout() -> list[list[str]]:
    return table("VeRL", "OpenRLHF")


def test_the_configuration_marks_each_value_as_the_page_does():
    marks = dict(
        re.findall(
            r"^\s*(\w+): .*?# (\w+)",
            "".join(
                (CONFIGURATIONS / f"{name}.yaml").read_text() for name in ("selective", "paper")
            ),
            re.M,
        )
    )
    # Keys that stand twice: of rollouts and of evaluations, which are all the paper's.
    for row in settings("full-data"):
        if row.verl.startswith("`"):
            for code in CODE.findall(row.verl):
                key = code.partition("=")[0].rpartition(".")[2]
                mark = marks.get(key, "paper")  # a model's path
                assert row.source.split()[0].strip(",") == mark, f"{row.name}: {row.source}"
    assert {row.source.split()[0].strip(",") for row in settings("selective")} == {
        *("paper", "DAPO", "ours")
    }


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_counts_that_trainers_write_differently_are_the_same(experiment):
    one, other = verl(experiment), openrlhf(experiment)
    actor, responses = "actor_rollout_ref.actor", int(one["actor_rollout_ref.rollout.n"])
    prompts = int(one["data.max_prompt_length"])
    assert int(other["--data.max_len"]) == prompts + int(one["data.max_response_length"])
    updates = int(one["data.train_batch_size"]) / int(one[f"{actor}.ppo_mini_batch_size"])
    rollout = int(other["--rollout.batch_size"]) * int(other["--rollout.n_samples_per_prompt"])
    assert rollout / int(other["--train.batch_size"]) == updates == 16
    assert int(other["--train.batch_size"]) == responses * int(one[f"{actor}.ppo_mini_batch_size"])
    # OpenRLHF rounds up the share of all its updates.
    passes = PROMPTS * int(one["trainer.total_epochs"])
    steps = passes * responses // int(other["--train.batch_size"])
    warmup = float(other["--actor.lr_warmup_ratio"]) * steps / updates
    assert warmup == pytest.approx(float(one[f"{actor}.optim.lr_warmup_steps"]), rel=1e-4)
    gpus = int(other["--vllm.num_engines"]) * int(other["--vllm.tensor_parallel_size"])
    assert gpus == 8 * int(one["trainer.nnodes"]) == 8 * int(other["--actor.num_nodes"])
    assert one["actor_rollout_ref.model.path"] == other["--actor.model_name_or_path"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_adapters_run_the_same_recipes_in_an_experiment(experiment):
    def recipes(adapter: str, option: re.Pattern[str]) -> list[str]:
        lines = map(shlex.join, dry_run("every_recipe.sh", adapter, experiment))
        return [found[1] for line in lines if (found := option.search(line))]

    names = recipes("verl", re.compile(r"token_weights\.recipe=(\w+)"))
    assert names == recipes("openrlhf", re.compile(r"--tokenweights\.recipe (\w+)"))
    assert names[0] == "full" and len(set(names)) == len(names) > 1


def test_experiments_are_those_of_the_page():
    rows = table("experiment", "model", "family", "runs by `every_recipe.sh`")
    assert [name.strip("`") for name, *_ in rows] == list(EXPERIMENTS)
    for name, model, family, _ in rows:
        assert verl(name.strip("`"))["actor_rollout_ref.model.path"] == f"Qwen/{model}"
        assert (family == "selective") == name.endswith("_selective`")
