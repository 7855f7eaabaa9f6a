"""The dataset of the command line: files, folders, saved datasets and names on the Hub."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from tokenweights._errors import TokenWeightsError, invalid

from tokenweights_trl.arguments import TrainArguments

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# What `save_to_disk` leaves in a folder, next to the data.
SAVED_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")


def training_dataset(
    arguments: TrainArguments, *, split: str | None = None
) -> Dataset | IterableDataset:
    """A split of the dataset that the arguments name.

    Args:
        arguments: Parsed command line.
        split: Name of the split; None takes the arguments' training split.

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
        dataset = _loaded(name, arguments, split or arguments.dataset_train_split)
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
    column = arguments.prompt_column or "prompt"
    if column not in first:
        hint = "Name the column that holds the question: `--prompt_column NAME`."
        got = f"columns {list(first)}"
        raise invalid("train", "dataset_name", f"with a `{column}` column", got, hint)
    if column == "prompt":
        return dataset
    if "prompt" in first:
        hint = "Leave `--prompt_column` out, or drop one of the two."
        raise invalid("train", "prompt_column", "without a `prompt` beside it", column, hint)
    return dataset.rename_column(column, "prompt")


def is_missing_path(name: str) -> bool:
    """Whether a name can only be a path, not a name on the Hub, and nothing is there."""
    path = Path(name)
    is_path = name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or name.endswith("/")
    return (is_path or path.suffix in FILE_FORMATS) and not path.exists()


def _loaded(name: str, arguments: TrainArguments, split: str) -> Dataset | IterableDataset:
    path = Path(name)
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
