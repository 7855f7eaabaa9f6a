"""Writes the paper's data sets as parquet files that VeRL reads.

    python prepare_data.py data                       # from the public hub
    python prepare_data.py data --only math aime_2024
    python prepare_data.py data --source math=/path/to/folder-or-file

The paper trains on DeepScaleR and on MATH of level 3 to 5, and evaluates on AIME 2024,
OlympiadBench, Minerva and MATH. It names no copies of them; the ones below are ours, and so is the
sentence behind each question.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from tokenweights.rewards import boxed_answer, reference_answer

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def _of_level_3_to_5(row: dict[str, Any]) -> bool:
    return row["level"] in ("Level 3", "Level 4", "Level 5")


@dataclass(frozen=True)
class Source:
    """Where a data set is, and which of its columns hold question and answer.

    Attributes:
        name: Public name.
        split: Split.
        question: Column of the question.
        answer: Column of the answer, or of a solution with a boxed answer.
        boxed: Whether the answer has to be taken out of its box.
        keep: Which rows to keep; None keeps all.
    """

    name: str
    split: str
    question: str
    answer: str
    boxed: bool = False
    keep: Callable[[dict[str, Any]], bool] | None = None


SOURCES = {
    "deepscaler": Source("agentica-org/DeepScaleR-Preview-Dataset", "train", "problem", "answer"),
    "math_3to5": Source(
        "DigitalLearningGmbH/MATH-lighteval",
        *("train", "problem", "solution"),
        boxed=True,
        keep=_of_level_3_to_5,
    ),
    "aime_2024": Source("HuggingFaceH4/aime_2024", "train", "problem", "answer"),
    "olympiadbench": Source("math-ai/olympiadbench", "test", "question", "final_answer"),
    "minerva": Source("math-ai/minervamath", "test", "question", "answer"),
    "math": Source("HuggingFaceH4/MATH-500", "test", "problem", "answer"),
}


def verl_rows(name: str, source: Source, rows: Dataset) -> Dataset:
    """A data set in the columns that VeRL reads.

    Args:
        name: The data set's short name, VeRL's `data_source`.
        source: Its columns.
        rows: Its rows.

    Returns:
        One row for each question with an answer.

    Raises:
        SystemExit: If a column is missing or no row is left.
        TokenWeightsError: If an answer is neither text nor a finite number.
    """
    missing = {source.question, source.answer} - set(rows.column_names)
    if missing:
        sys.exit(f"{name}: no column {sorted(missing)}; there are {rows.column_names}")
    written = []
    for index, row in enumerate(rows):
        answer = row[source.answer]
        answer = answer[0] if isinstance(answer, list) and answer else answer
        answer = boxed_answer(answer) if source.boxed else answer
        if (source.keep and not source.keep(row)) or answer in (None, "", []):
            continue
        truth = reference_answer(answer, place=f"{name}, row {index}").strip("$ ")
        question = f"{row[source.question].strip()}\n{INSTRUCTION}"
        written.append(
            {
                "data_source": name,
                "prompt": [{"role": "user", "content": question}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": truth},
                "extra_info": {"index": index, "split": source.split},
            }
        )
    if not written:
        sys.exit(f"{name}: no question with an answer among {len(rows)} rows")
    return Dataset.from_list(written)


def main(argv: list[str] | None = None) -> None:
    """Downloads, or reads, and writes one file for each data set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the parquet files go")
    parser.add_argument("--only", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--source", action="append", default=[], metavar="NAME=PATH")
    options = parser.parse_args(argv)
    places = dict(item.partition("=")[::2] for item in options.source)
    if unknown := set(places) - set(SOURCES):
        parser.error(f"unknown {sorted(unknown)}; known are {', '.join(SOURCES)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        source = SOURCES[name]
        place = places.get(name, source.name)
        if Path(place).is_file():
            rows = Dataset.from_parquet(place)
        else:
            rows = load_dataset(place, split=source.split)
        path = options.folder / f"{name}.parquet"
        rows = verl_rows(name, source, rows)
        rows.to_parquet(path)
        print(f"{path}: {len(rows)} questions")


if __name__ == "__main__":
    main()
