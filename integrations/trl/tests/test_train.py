"""The command line, end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from datasets import Dataset, DatasetDict, IterableDataset
from ranks import launcher
from tokenweights import TokenWeightsError
from tokenweights.report import run_from_directory

from tokenweights_trl.arguments import TrainArguments
from tokenweights_trl.config import TokenWeightsGRPOConfig
from tokenweights_trl.data import training_dataset
from tokenweights_trl.train import checkpoint_of, main

SOURCE = Path(__file__).parent.parent / "src"
ROWS = [{"prompt": prompt, "answer": str(number)} for number, prompt in enumerate(tiny.PROMPTS)]


def jsonl(folder, rows=ROWS):
    path = folder / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def started(*arguments, ranks=1):
    command, environment = launcher(ranks)
    paths = os.pathsep.join([str(SOURCE), environment.get("PYTHONPATH", "")])
    command += ["-m", "tokenweights_trl.train", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment | {"PYTHONPATH": paths}, text=True, **pipes)


def cli(*arguments, ranks=1):
    process = started(*arguments, ranks=ranks)
    printed, errors = process.communicate(timeout=1800)
    return subprocess.CompletedProcess(process.args, process.returncode, printed, errors)


@pytest.mark.versions
@pytest.mark.parametrize(
    ("recipe", "ranks"), [("low2high", 1), ('{"name": "anchor20", "layers": [1]}', 2)]
)
def test_two_steps_from_the_command_line(tmp_path, recipe, ranks):
    tiny.policy().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    # Device, precision, backend and files are the machine's and the command's own.
    options = (
        "--per_device_train_batch_size 4 --num_generations 4 --max_completion_length 6 "
        "--max_steps 2 --save_strategy no --disable_tqdm true --overlong_buffer 2 "
        "--token_records_steps 1 --seed 3"
    )
    done = cli(
        *("--model", tmp_path / "model"),
        *("--dataset", jsonl(tmp_path)),
        *("--recipe", recipe),
        *("--output_dir", tmp_path / "out"),
        *options.split(),
        ranks=ranks,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    recipe_name = "low2high" if ranks == 1 else "anchor20"
    assert "token_weights/weight_mean" in done.stdout
    assert "rewards/boxed_match/mean" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
    out = tmp_path / "out"
    assert len((out / "tokens.jsonl").read_text().splitlines()) == 8
    found = run_from_directory(out)
    assert [line["step"] for line in found.metrics if "reward" in line] == [1, 2]
    assert found.title == f"{recipe_name} on train.jsonl" and "deciding row" in found.recipe
    assert found.settings["model"] == str(tmp_path / "model") and found.settings["seed"] == 3
    assert found.settings["trl"] and found.settings["rewards"] == "boxed_match"
    assert "tokenweights report" in done.stdout


def test_a_misspelt_recipe_fails_before_anything_is_loaded(tmp_path):
    done = cli("--model", "no/model", "--dataset", "no.jsonl", "--recipe", "lowhigh", "--use_cpu")
    assert done.returncode == 2
    assert "Did you mean 'low2high'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Pass `--model NAME`"),
        (["--model", "./nomodel"], "expected `model_name_or_path` a path that exists"),
        (["--model", ".", "--dataset", "./nofolder"], "expected `dataset_name` a path that exists"),
    ],
    ids=["no model", "missing model", "missing dataset"],
)
def test_a_refusal_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    given = ["--recipe", "low2high", "--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        main([*given, *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ": error: `train`: expected" in line and message in line


def folder_of_jsonl(folder):
    folder.mkdir()
    jsonl(folder)
    return folder


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_datasets_come_from_files_and_folders(tmp_path, streaming):
    rows = Dataset.from_list(ROWS)
    rows.to_parquet(tmp_path / "train.parquet")
    rows.save_to_disk(tmp_path / "rows")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    folder = folder_of_jsonl(tmp_path / "folder")
    (folder / "train.jsonl").rename(folder / "train.json")  # a plain file, not `save_to_disk`'s
    saved = (tmp_path / name for name in ("train.parquet", "rows", "splits"))
    for name in (jsonl(tmp_path), folder, *saved):
        arguments = TrainArguments(dataset_name=str(name), dataset_streaming=streaming)
        dataset = training_dataset(arguments)
        assert isinstance(dataset, IterableDataset) == streaming
        assert list(dataset) == ROWS


def test_the_split_is_the_one_asked_for(tmp_path):
    rows = Dataset.from_list(ROWS)
    DatasetDict({"train": rows, "few": rows.select(range(3))}).save_to_disk(tmp_path / "splits")
    few = TrainArguments(dataset_name=str(tmp_path / "splits"), dataset_train_split="few")
    assert list(training_dataset(few)) == ROWS[:3]
    part = TrainArguments(dataset_name=str(jsonl(tmp_path)), dataset_train_split="train[:2]")
    assert list(training_dataset(part)) == ROWS[:2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "Pass `--dataset NAME`"),
        ("gone.jsonl", "a path that exists, got gone.jsonl"),
        ("./nofolder", "a path that exists, got ./nofolder"),
        ("/no/such/folder", "a path that exists, got /no/such/folder"),
        ("runs/data/folder", "a path that exists, got runs/data/folder"),
        ("nobody/nothing", "a dataset that loads, got nobody/nothing"),
    ],
)
def test_a_missing_dataset_is_named(name, message):
    with pytest.raises(TokenWeightsError, match=message):
        training_dataset(TrainArguments(dataset_name=name))


def written(path, text):
    path.write_text(text)
    return path


def made(path):
    path.mkdir()
    return path


def saved(path, rows):
    rows.save_to_disk(path)
    return path


EMPTY = {"prompt": [], "answer": []}
BROKEN = {
    "empty file": (lambda at: written(at / "rows.jsonl", ""), {}, "with rows, got none in"),
    "malformed file": (
        lambda at: written(at / "rows.jsonl", '{"prompt": "1+1="'),
        {},
        r"a dataset that loads, got .*rows.jsonl \(JSON parse error",
    ),
    "unknown format": (lambda at: written(at / "rows.txt", "1"), {}, "one of .json, .jsonl"),
    "empty saved": (
        lambda at: saved(at / "saved", Dataset.from_dict(EMPTY)),
        {},
        "with rows, got none in",
    ),
    "half of a saved folder": (
        lambda at: written(made(at / "saved") / "state.json", "{}").parent,
        {},
        "a dataset that loads",
    ),
    "empty folder": (lambda at: made(at / "folder"), {}, "a folder with .json, .jsonl, .parquet"),
    "saved without the split": (
        lambda at: saved(at / "saved", DatasetDict({"test": Dataset.from_list(ROWS)})),
        {},
        "`dataset_train_split` one of test, got train",
    ),
    "saved rows, other split": (
        lambda at: saved(at / "saved", Dataset.from_list(ROWS)),
        {"dataset_train_split": "test"},
        "`dataset_train_split` one of train, got test",
    ),
    "file, other split": (jsonl, {"dataset_train_split": "test"}, r"(Unknown|Bad) split:? \"?test"),
    "file, configuration": (jsonl, {"dataset_config": "main"}, "expected `dataset_config` None"),
    "no prompts": (
        lambda at: jsonl(at, [{"question": "1+1=", "answer": "2"}]),
        {},
        r"with a `prompt` column, got columns \['question', 'answer'\]. Name",
    ),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_dataset_that_cannot_be_used_is_refused(tmp_path, case, streaming):
    make, changes, message = BROKEN[case]
    arguments = TrainArguments(
        dataset_name=str(make(tmp_path)), dataset_streaming=streaming, **changes
    )
    with pytest.raises(TokenWeightsError, match=message) as error:
        training_dataset(arguments)
    assert "\n" not in str(error.value)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" not in lines and ": error: " in lines[-1]
    return lines[-1].partition(": error: ")[2]


@pytest.fixture
def policy(tmp_path):
    tiny.policy().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_errors_of_others_are_one_line(tmp_path, policy, capsys):
    data = jsonl(tmp_path)
    common = ("--dataset", data, "--recipe", "low2high", "--output_dir", tmp_path / "out")
    assert (
        refused(capsys, "--modle", policy, *common)
        == "unknown option --modle. Did you mean --model?"
    )
    assert "a model that loads, got no/model" in refused(capsys, "--model", "no/model", *common)
    assert "must be divisible" in refused(
        capsys, "--model", policy, *common, "--num_generations", 3
    )
    config = json.loads((policy / "config.json").read_text())
    reader = tmp_path / "reader"
    reader.mkdir()
    (reader / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    assert "a language model, got BertForMaskedLM" in refused(capsys, "--model", reader, *common)


def test_chats_without_a_template_are_refused(tmp_path, policy, capsys):
    chats = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    data = jsonl(tmp_path, chats)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    (policy / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(policy)
    line = refused(capsys, "--model", policy, "--dataset", data, "--recipe", "low2high",
                   "--output_dir", tmp_path / "out")  # fmt: skip
    assert "with a chat template" in line


def test_a_model_with_code_of_its_own_is_loaded_where_that_is_trusted(
    tmp_path, policy, capsys, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (policy / "configuration_own.py").write_text(
        "from transformers import Qwen3Config\n"
        "class OwnConfig(Qwen3Config):\n"
        "    model_type = 'own'\n"
    )
    (policy / "modeling_own.py").write_text(
        "from transformers import Qwen3ForCausalLM\n"
        "from .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(Qwen3ForCausalLM):\n"
        "    config_class = OwnConfig\n"
    )
    where = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    own = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": where}
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | own))
    chats = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    given = ("--model", policy, "--dataset", jsonl(tmp_path, chats), "--recipe", "low2high",
             "--output_dir", tmp_path / "out")  # fmt: skip
    line = refused(capsys, *given)
    assert "a model that loads" in line and "trust_remote_code=True" in line
    # What is refused next is found only after the model has been loaded.
    assert "with a chat template" in refused(capsys, *given, "--trust_remote_code", "true")


def test_the_prompt_may_stand_in_another_column(tmp_path):
    rows = [{"question": row["prompt"], "answer": row["answer"]} for row in ROWS]
    arguments = TrainArguments(dataset_name=str(jsonl(tmp_path, rows)), prompt_column="question")
    assert list(training_dataset(arguments)["prompt"]) == [row["prompt"] for row in ROWS]
    both = TrainArguments(dataset_name=str(jsonl(tmp_path)), prompt_column="answer")
    with pytest.raises(TokenWeightsError, match="without a `prompt` beside it"):
        training_dataset(both)


def resuming(tmp_path, given):
    return checkpoint_of(
        TokenWeightsGRPOConfig(
            str(tmp_path), recipe="full", use_cpu=True, bf16=False, resume_from_checkpoint=given
        )
    )


def test_true_is_the_last_checkpoint(tmp_path):
    for given in (None, "False", "false", ""):
        assert resuming(tmp_path, given) is None
    with pytest.raises(TokenWeightsError, match="True with a checkpoint in `output_dir`"):
        resuming(tmp_path, "True")
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert resuming(tmp_path, "True") == str(tmp_path / "checkpoint-10")
    named = str(tmp_path / "checkpoint-9")
    assert resuming(tmp_path, named) == named
    with pytest.raises(TokenWeightsError, match="a checkpoint, got nowhere"):
        resuming(tmp_path, "nowhere")


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_interrupted_run_saves_and_says_how_to_go_on(tmp_path, policy, ranks):
    out = tmp_path / "out"
    options = (
        "--recipe low2high --per_device_train_batch_size 4 --num_generations 4 "
        "--max_completion_length 6 --save_strategy no --disable_tqdm true"
    )
    arguments = ["--model", policy, "--dataset", jsonl(tmp_path), "--output_dir", out]
    arguments += options.split()
    process = started(*arguments, "--max_steps", 100000, ranks=ranks)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=600)
    if ranks == 1:
        assert process.returncode == 130, errors[-4000:]
    assert process.returncode != 0
    (checkpoint,) = out.glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert f"interrupted at step {step}" in printed
    resume = next(line for line in printed.splitlines() if line.startswith("resume "))
    start = "torchrun --nproc_per_node 2" if ranks == 2 else "python"
    assert resume.startswith(f"resume  {start} -m tokenweights_trl.train --model {policy}")
    assert resume.endswith(" --resume_from_checkpoint True")
    if ranks == 1:
        more = ["--max_steps", step + 1, "--resume_from_checkpoint", "True"]
        done = cli(*arguments, *more)
        assert done.returncode == 0, done.stderr[-4000:]
        steps = [line["step"] for line in run_from_directory(out).metrics if "reward" in line]
        assert steps == list(range(1, step + 2))
        # A run that starts anew begins its files anew.
        assert cli(*arguments, "--max_steps", 1).returncode == 0
        lines = map(json.loads, metrics.read_text().splitlines())
        assert [line["step"] for line in lines if "reward" in line] == [1]


def test_held_out_rows_are_evaluated_where_asked_for(tmp_path, policy):
    rows = Dataset.from_list(ROWS)
    DatasetDict({"train": rows, "test": rows.select(range(2))}).save_to_disk(tmp_path / "rows")
    options = (
        "--recipe full --per_device_train_batch_size 4 --num_generations 4 --max_steps 1 "
        "--max_completion_length 6 --save_strategy no --eval_strategy steps --eval_steps 1 "
        "--per_device_eval_batch_size 4"
    )
    done = cli("--model", policy, "--dataset", tmp_path / "rows", "--output_dir", tmp_path / "out",
               *options.split())  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert r"comparing no \boxed{} with the answer" in done.stderr
    assert any("eval_reward" in line for line in run_from_directory(tmp_path / "out").metrics)
