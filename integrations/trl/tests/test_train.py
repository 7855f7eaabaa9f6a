"""The command line, end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from datasets import Dataset, DatasetDict
from tokenweights import TokenWeightsError

from tokenweights_trl.train import TrainArguments, boxed_reward, training_dataset

SOURCE = Path(__file__).parent.parent / "src"
ROWS = [{"prompt": prompt, "answer": str(number)} for number, prompt in enumerate(tiny.PROMPTS)]


def jsonl(folder, rows=ROWS):
    path = folder / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def cli(*arguments, ranks=1):
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launcher = [sys.executable, *(torchrun if ranks > 1 else [])]
    command = [*launcher, "-m", "tokenweights_trl.train", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


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
    assert done.returncode != 0
    assert "Did you mean 'low2high'?" in done.stderr


def test_datasets_come_from_files_and_folders(tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.to_parquet(tmp_path / "train.parquet")
    rows.save_to_disk(tmp_path / "rows")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    for name in (jsonl(tmp_path), *(tmp_path / n for n in ("train.parquet", "rows", "splits"))):
        dataset = training_dataset(TrainArguments(dataset_name=str(name)))
        assert dataset.to_list() == ROWS


@pytest.mark.parametrize(
    ("name", "message"),
    [(None, "Pass `--dataset NAME`"), ("gone.jsonl", "a file that exists")],
)
def test_a_missing_dataset_is_named(name, message):
    with pytest.raises(TokenWeightsError, match=message):
        training_dataset(TrainArguments(dataset_name=name))


def test_a_dataset_without_prompts_is_refused(tmp_path):
    path = jsonl(tmp_path, [{"question": "1+1=", "answer": "2"}])
    with pytest.raises(TokenWeightsError, match="with a `prompt` column"):
        training_dataset(TrainArguments(dataset_name=str(path)))


def test_the_reward_is_boxed_match_less_the_overlong_penalty():
    arguments = TrainArguments(overlong_buffer=4)
    reward = boxed_reward(arguments, ["prompt", "solution"], max_completion_length=8)
    completions = [r"\boxed{4}", [{"role": "assistant", "content": r"\boxed{5}"}], "4"]
    ids = [[0] * length for length in (4, 6, 8)]
    rewards = reward(completions=completions, completion_ids=ids, solution=["4", "4", 4])
    assert rewards == [1.0, -1.5, -3.0]


def test_a_dataset_without_answers_is_refused():
    with pytest.raises(TokenWeightsError, match="answer or solution"):
        boxed_reward(TrainArguments(), ["prompt"], max_completion_length=8)
