"""Training from the command line: `python -m tokenweights_trl.train --help`."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from tokenweights._errors import TokenWeightsError, invalid
from tokenweights.rewards import boxed_match_reward, overlong_penalty, reference_answer
from trl.scripts.utils import ScriptArguments, TrlParser
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

from tokenweights_trl.config import TokenWeightsGRPOConfig
from tokenweights_trl.trainer import TokenWeightsGRPOTrainer

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# What `save_to_disk` leaves in a folder, next to the data.
SAVED_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")
# Arguments with which TRL calls a reward function; it hands on no column of these names.
RESERVED_COLUMNS = (
    *("prompt", "prompts", "completion", "completions", "completion_ids"),
    *("trainer_state", "log_extra", "log_metric", "environments"),
)


@dataclass
class TrainArguments(ScriptArguments):
    """TRL's script arguments, and how a response is rewarded.

    Args:
        dataset_name: A json, jsonl or parquet file, a folder of such files or one made by
            `save_to_disk`, or a name on the Hub. Also `--dataset`.
        answer_column: Column of the reference answer.
        overlong_buffer: Length of the soft penalty's ramp before `max_completion_length`, in
            tokens; 0 leaves long responses unpunished.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "aliases": ["--dataset"],
            "help": "A json, jsonl or parquet file, a folder of such files or one made by "
            "`save_to_disk`, or a name on the Hub.",
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
        A dataset with at least one row and a `prompt` column.

    Raises:
        TokenWeightsError: If no dataset is named, it cannot be loaded as the arguments ask, it is
            empty, or it has no `prompt`.
    """
    name = arguments.dataset_name
    if not name:
        raise invalid("train", "dataset_name", "a path or a name", name, "Pass `--dataset NAME`.")
    if is_missing_path(name):
        raise invalid("train", "dataset_name", "a path that exists", name, "Check the path.")
    try:
        dataset = _loaded(name, arguments)
        first = next(iter(dataset))
    except TokenWeightsError:
        raise
    except (StopIteration, IndexError) as error:  # datasets raises either for no rows
        hint = "Check the file, or the split."
        raise invalid("train", "dataset_name", "with rows", f"none in {name}", hint) from error
    except (DatasetsError, OSError, ValueError, LookupError, TypeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split()) or type(cause).__name__
        hint = "Check name, split, content and, for the Hub, the connection."
        condition, got = "a dataset that loads", f"{name} ({reason.rstrip('.')})"
        raise invalid("train", "dataset_name", condition, got, hint) from error
    if "prompt" not in first:
        hint = "Rename the column that holds the question."
        got = f"columns {list(first)}"
        raise invalid("train", "dataset_name", "with a `prompt` column", got, hint)
    return dataset


def is_missing_path(name: str) -> bool:
    """Whether a name can only be a path, not a name on the Hub, and nothing is there."""
    path = Path(name)
    is_path = name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or name.endswith("/")
    return (is_path or path.suffix in FILE_FORMATS) and not path.exists()


def _loaded(name: str, arguments: TrainArguments) -> Dataset | IterableDataset:
    path, split = Path(name), arguments.dataset_train_split
    is_saved = path.is_dir() and any((path / file).is_file() for file in SAVED_FILES)
    if arguments.dataset_config and (is_saved or path.is_file()):
        got, hint = arguments.dataset_config, "Only a name on the Hub has configurations."
        raise invalid("train", "dataset_config", "None for a file or a saved dataset", got, hint)
    if is_saved:
        saved = load_from_disk(name)
        splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
        if split not in splits:
            condition, hint = (
                f"one of {', '.join(map(str, splits))}",
                f"These splits are in {name}.",
            )
            raise invalid("train", "dataset_train_split", condition, split, hint)
        dataset = splits[split]
        return dataset.to_iterable_dataset() if arguments.dataset_streaming else dataset
    options: dict[str, Any] = {"split": split, "streaming": arguments.dataset_streaming}
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            condition, hint = f"one of {', '.join(FILE_FORMATS)}", "Convert the file."
            raise invalid("train", "dataset_name", condition, name, hint)
        return load_dataset(FILE_FORMATS[path.suffix], data_files=name, **options)
    if path.is_dir() and not any(file.suffix in FILE_FORMATS for file in path.rglob("*")):
        condition = f"a folder with {', '.join(FILE_FORMATS)} files or one made by `save_to_disk`"
        raise invalid("train", "dataset_name", condition, name, "Check the path.")
    return load_dataset(name, name=arguments.dataset_config, **options)


def boxed_reward(
    arguments: TrainArguments,
    dataset: Dataset | IterableDataset,
    *,
    max_completion_length: int | None,
) -> Callable[..., list[float]]:
    """A reward function for TRL: boxed exact match, less the overlong penalty where asked for.

    Args:
        arguments: Parsed command line.
        dataset: The dataset to train on. Every answer is checked here, those of a stream when they
            come.
        max_completion_length: Longest response, in tokens.

    Returns:
        A function of TRL's keyword arguments that gives one reward for each response.

    Raises:
        TokenWeightsError: If the dataset has no column with the reference answer, its name is one
            that TRL keeps for itself, a row has no answer, or the overlong buffer does not fit.
    """
    buffer, longest = arguments.overlong_buffer, max_completion_length
    if buffer and not 0 < buffer <= (longest or 0):
        condition = f"in [0, max_completion_length = {longest}]"
        hint = "It is the last part of the longest response; 0 is no penalty."
        raise invalid("train", "overlong_buffer", condition, buffer, hint)
    column = _answer_column(arguments, list(next(iter(dataset))))
    if isinstance(dataset, Dataset):
        for row, answer in enumerate(dataset[column]):
            reference_answer(answer, place=f"row {row}, column {column!r}")

    def boxed_match(
        completions: list[Any], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        place = f"a row, column {column!r}"
        rewards = [
            boxed_match_reward(text, reference_answer(answer, place=place))
            for text, answer in zip(texts, kwargs[column], strict=True)
        ]
        if buffer and longest:
            lengths = torch.tensor([len(ids) for ids in completion_ids])
            penalties = overlong_penalty(lengths, max_length=longest, buffer_length=buffer)
            rewards = (penalties + torch.tensor(rewards, dtype=penalties.dtype)).tolist()
        return rewards

    return boxed_match


def _answer_column(arguments: TrainArguments, columns: list[str]) -> str:
    named = [arguments.answer_column] if arguments.answer_column else ["answer", "solution"]
    if named[0] in RESERVED_COLUMNS:
        hint = "TRL uses this name itself and does not pass the column on. Rename the column."
        raise invalid("train", "answer_column", "with a name of its own", named[0], hint)
    for name in named:
        if name in columns:
            return name
    hint = "Name the column of the reference answer."
    raise invalid("train", "answer_column", f"to be a column ({' or '.join(named)})", columns, hint)


def main(argv: list[str] | None = None) -> None:
    """Trains a model by recipe and saves it to `output_dir`."""
    parts: Any = (TrainArguments, TokenWeightsGRPOConfig, TrainModelConfig)
    parser = TrlParser(parts)
    try:
        trainer = _trainer(*parser.parse_args_and_config(argv))
    except TokenWeightsError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model(trainer.args.output_dir)
    if trainer.accelerator.num_processes > 1:
        # A thread of gloo's may still have to let go of the last collective's tensors, and needs
        # the interpreter for it. A process that ends before it got it hangs or is aborted.
        time.sleep(1.0)
    trainer.accelerator.end_training()


def _trainer(
    script: TrainArguments, training: TokenWeightsGRPOConfig, model: TrainModelConfig
) -> TokenWeightsGRPOTrainer:
    name = model.model_name_or_path
    if not name:
        hint = "Pass `--model NAME`."
        raise invalid("train", "model_name_or_path", "a path or a name", name, hint)
    if is_missing_path(name):
        raise invalid("train", "model_name_or_path", "a path that exists", name, "Check the path.")
    dataset = training_dataset(script)
    reward = boxed_reward(script, dataset, max_completion_length=training.max_completion_length)
    settings: Any = training.model_init_kwargs or {}  # TRL has parsed its JSON
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **settings,
    }
    return TokenWeightsGRPOTrainer(
        model=name,
        reward_funcs=reward,
        args=training,
        train_dataset=dataset,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


if __name__ == "__main__":
    main()
