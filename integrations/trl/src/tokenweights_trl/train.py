"""Training from the command line: `python -m tokenweights_trl.train --help`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from tokenweights._errors import invalid
from tokenweights.rewards import boxed_match_reward, overlong_penalty
from trl.scripts.utils import ScriptArguments, TrlParser
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

from tokenweights_trl.config import TokenWeightsGRPOConfig
from tokenweights_trl.trainer import TokenWeightsGRPOTrainer

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class TrainArguments(ScriptArguments):
    """TRL's script arguments, and how a response is rewarded.

    Args:
        dataset_name: A json, jsonl or parquet file, a folder made by `save_to_disk`, or a name on
            the Hub. Also `--dataset`.
        answer_column: Column of the reference answer.
        overlong_buffer: Length of the soft penalty's ramp before `max_completion_length`, in
            tokens; 0 leaves long responses unpunished.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "aliases": ["--dataset"],
            "help": "A json, jsonl or parquet file, a `save_to_disk` folder, or a name on the Hub.",
        },
    )
    answer_column: str | None = field(
        default=None,
        metadata={"help": "Column of the reference answer. None takes `answer` or `solution`."},
    )
    overlong_buffer: int = field(
        default=0,
        metadata={"help": "Tokens before `max_completion_length` with a growing penalty; 0: none."},
    )


@dataclass
class TrainModelConfig(ModelConfig):
    """TRL's model arguments; the model's name is also `--model`."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"aliases": ["--model"], "help": "Model checkpoint, a folder or a Hub name."},
    )


def training_dataset(arguments: TrainArguments) -> Dataset | IterableDataset:
    """The training split of the dataset that the arguments name.

    Args:
        arguments: Parsed command line.

    Returns:
        A dataset with a `prompt` column.

    Raises:
        TokenWeightsError: If no dataset is named, or it has no `prompt`.
    """
    name, split = arguments.dataset_name, arguments.dataset_train_split
    if not name:
        raise invalid("train", "dataset_name", "a path or a name", name, "Pass `--dataset NAME`.")
    path = Path(name)
    if path.suffix in FILE_FORMATS:
        if not path.is_file():
            raise invalid("train", "dataset_name", "a file that exists", name, "Check the path.")
        dataset = load_dataset(FILE_FORMATS[path.suffix], data_files=name, split="train")
    elif path.is_dir() and any(path.glob("*.json")):
        dataset = load_from_disk(name)
        dataset = dataset[split] if isinstance(dataset, DatasetDict) else dataset
    else:
        dataset = load_dataset(
            name,
            name=arguments.dataset_config,
            split=split,
            streaming=arguments.dataset_streaming,
        )
    columns = dataset.column_names or []
    if "prompt" not in columns:
        hint = "Rename the column that holds the question."
        raise invalid("train", "dataset_name", "with a `prompt` column", f"columns {columns}", hint)
    return dataset


def boxed_reward(
    arguments: TrainArguments, columns: list[str], *, max_completion_length: int
) -> Callable[..., list[float]]:
    """A reward function for TRL: boxed exact match, less the overlong penalty where asked for.

    Args:
        arguments: Parsed command line.
        columns: Columns of the dataset.
        max_completion_length: Longest response, in tokens.

    Returns:
        A function of TRL's keyword arguments that gives one reward for each response.

    Raises:
        TokenWeightsError: If the dataset has no column with the reference answer.
    """
    named = [arguments.answer_column] if arguments.answer_column else ["answer", "solution"]
    column = next((name for name in named if name in columns), None)
    if column is None:
        hint = "Name the column of the reference answer."
        expected = " or ".join(named)
        raise invalid("train", "answer_column", f"to be a column ({expected})", columns, hint)
    buffer = arguments.overlong_buffer

    def boxed_match(
        completions: list[Any], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        rewards = [
            boxed_match_reward(text, str(answer))
            for text, answer in zip(texts, kwargs[column], strict=True)
        ]
        if buffer:
            lengths = torch.tensor([len(ids) for ids in completion_ids])
            penalties = overlong_penalty(
                lengths, max_length=max_completion_length, buffer_length=buffer
            )
            rewards = (torch.tensor(rewards) + penalties).tolist()
        return rewards

    return boxed_match


def main(argv: list[str] | None = None) -> None:
    """Trains a model by recipe and saves it to `output_dir`."""
    parts: Any = (TrainArguments, TokenWeightsGRPOConfig, TrainModelConfig)
    parser = TrlParser(parts)
    script, training, model = parser.parse_args_and_config(argv)
    if not model.model_name_or_path:
        got = model.model_name_or_path
        hint = "Pass `--model NAME`."
        raise invalid("train", "model_name_or_path", "a path or a name", got, hint)
    dataset = training_dataset(script)
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **(training.model_init_kwargs or {}),
    }
    trainer = TokenWeightsGRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=boxed_reward(
            script,
            list(dataset.column_names or []),
            max_completion_length=training.max_completion_length,
        ),
        args=training,
        train_dataset=dataset,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)


if __name__ == "__main__":
    main()
