"""The command line, end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from datasets import Dataset, DatasetDict, IterableDataset
from tokenweights import TokenWeightsError

from tokenweights_trl.train import (
    RESERVED_COLUMNS,
    TrainArguments,
    boxed_reward,
    main,
    training_dataset,
)

SOURCE = Path(__file__).parent.parent / "src"
ROWS = [{"prompt": prompt, "answer": str(number)} for number, prompt in enumerate(tiny.PROMPTS)]


def jsonl(folder, rows=ROWS):
    path = folder / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def cli(*arguments, ranks=1):
    inherited = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SOURCE), inherited])}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launcher = [sys.executable, *(torchrun if ranks > 1 else [])]
    command = [*launcher, "-m", "tokenweights_trl.train", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.versions
@pytest.mark.parametrize(
    ("recipe", "ranks"), [("low2high", 1), ('{"name": "anchor20", "layers": [1]}', 2)]
)
def test_two_steps_from_the_command_line(tmp_path, recipe, ranks):
    tiny.policy().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    options = (
        "--per_device_train_batch_size 4 --num_generations 4 --max_completion_length 6 "
        "--max_steps 2 --logging_steps 1 --use_cpu --bf16 false --report_to none "
        "--save_strategy no --disable_tqdm true --overlong_buffer 2 --token_records_steps 1"
    )
    done = cli(
        *("--model", tmp_path / "model"),
        *("--dataset", jsonl(tmp_path)),
        *("--recipe", recipe),
        *("--output_dir", tmp_path / "out"),
        *("--token_records", tmp_path / "tokens.jsonl"),
        *options.split(),
        *(["--ddp_backend", "gloo"] if ranks > 1 else []),
        ranks=ranks,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "token_weights/weight_mean" in done.stdout
    assert "rewards/boxed_match/mean" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert len((tmp_path / "tokens.jsonl").read_text().splitlines()) == 8


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
        r"with a `prompt` column, got columns \['question', 'answer'\]",
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


def rows_with(answers, column="answer"):
    return Dataset.from_dict({"prompt": ["1+1="] * len(answers), column: answers})


def test_the_reward_is_boxed_match_less_the_overlong_penalty():
    arguments = TrainArguments(overlong_buffer=4)
    dataset = rows_with(["4"], "solution")
    reward = boxed_reward(arguments, dataset, max_completion_length=8)
    completions = [r"\boxed{4}", [{"role": "assistant", "content": r"\boxed{5}"}], "4"]
    ids = [[0] * length for length in (4, 6, 8)]
    rewards = reward(completions=completions, completion_ids=ids, solution=["4", "4", 4])
    assert rewards == [1.0, -1.5, -3.0]


@pytest.mark.parametrize(
    ("answers", "text"),
    [([7.0], "7"), ([7], "7"), ([-2.0], "-2"), ([0.5], "0.5"), (["7.0"], "7.0")],
)
def test_numbers_match_as_they_are_written(answers, text):
    reward = boxed_reward(TrainArguments(), rows_with(answers), max_completion_length=8)
    completions = [rf"\boxed{{{text}}}", r"\boxed{None}"]
    rewards = reward(completions=completions, completion_ids=[[0], [0]], answer=answers * 2)
    assert rewards == [1.0, -1.0]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["4", None, None], r"got None \(row 1, column 'answer'\)"),
        ([1, None], r"got None \(row 1, column 'answer'\)"),
        (["4", " "], r"got ' ' \(row 1, column 'answer'\)"),
        ([1.0, float("nan")], r"got nan \(row 1, column 'answer'\)"),
        ([float("inf")], r"got inf \(row 0, column 'answer'\)"),
        ([True], r"got True \(row 0, column 'answer'\)"),
        ([["4"]], r"got \['4'\] \(row 0, column 'answer'\)"),
    ],
    ids=str,
)
def test_a_row_without_an_answer_is_refused(answers, message):
    with pytest.raises(TokenWeightsError, match=message):
        boxed_reward(TrainArguments(), rows_with(answers), max_completion_length=8)
    stream = rows_with(answers).to_iterable_dataset()
    reward = boxed_reward(TrainArguments(), stream, max_completion_length=8)
    completions, ids = [r"\boxed{None}"] * len(answers), [[0]] * len(answers)
    with pytest.raises(TokenWeightsError, match=r"a row, column 'answer'"):
        reward(completions=completions, completion_ids=ids, answer=answers)


def test_a_dataset_without_answers_is_refused():
    with pytest.raises(TokenWeightsError, match="answer or solution"):
        boxed_reward(TrainArguments(), rows_with(["4"], "result"), max_completion_length=8)
    with pytest.raises(TokenWeightsError, match=r"to be a column \(answers\)"):
        arguments = TrainArguments(answer_column="answers")
        boxed_reward(arguments, rows_with(["4"]), max_completion_length=8)


@pytest.mark.parametrize("column", RESERVED_COLUMNS)
def test_an_answer_column_that_trl_keeps_for_itself_is_refused(column):
    dataset = Dataset.from_dict({"prompt": ["1+1="]} | {column: ["2"]})
    with pytest.raises(
        TokenWeightsError, match=f"`answer_column` with a name of its own.*{column}"
    ):
        boxed_reward(TrainArguments(answer_column=column), dataset, max_completion_length=8)


@pytest.mark.parametrize("buffer", [-1, 9])
def test_an_overlong_buffer_outside_the_response_is_refused(buffer):
    arguments = TrainArguments(overlong_buffer=buffer)
    with pytest.raises(TokenWeightsError, match=r"`overlong_buffer` in \[0, .* = 8\]"):
        boxed_reward(arguments, rows_with(["4"]), max_completion_length=8)
    boxed_reward(TrainArguments(overlong_buffer=8), rows_with(["4"]), max_completion_length=8)
