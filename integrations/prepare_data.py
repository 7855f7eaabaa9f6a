"""Writes the paper's data sets as parquet files that VeRL and OpenRLHF read.

    python prepare_data.py data                       # from the public hub
    python prepare_data.py data --only math aime_2024
    python prepare_data.py data --source math=/path/to/folder-or-file

`data/` has the files of the full-data experiments, `data/selective/` those of the selective ones:
40 % of each. The paper names the training sets (B.3) and the copies of the benchmarks (M). Ours are
the level of the SimpleRL split, the part of OlympiadBench, how the 40 % are drawn, and the sentence
behind each question.
"""

import argparse
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from tokenweights.rewards import boxed_answer, reference_answer

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
SELECTIVE, SEED = 0.4, 42


@dataclass(frozen=True)
class Source:
    """Where a data set is, and which of its columns hold question and answer.

    Attributes:
        name: Public name.
        split: Split.
        question: Column of the question; a dot goes into a column of fields.
        answer: Column of the answer, or of a solution with a boxed answer.
        boxed: Whether the answer has to be taken out of its box.
        config: Configuration, where the data set has several.
        files: Files, where the data set has several under one split.
        once: Whether rows repeat, and each question counts once.
    """

    name: str
    split: str
    question: str
    answer: str
    boxed: bool = False
    config: str | None = None
    files: str | None = None
    once: bool = False


SOURCES = {
    "deepscaler": Source("agentica-org/DeepScaleR-Preview-Dataset", "train", "problem", "answer"),
    "simplerl_qwen": Source(
        "hkust-nlp/SimpleRL-Zoo-Data",
        *("train", "question", "gt_answer"),
        files="simplelr_qwen_level3to5/train.parquet",
    ),
    "aime_2024": Source(
        "BytedTsinghua-SIA/AIME-2024",
        *("train", "extra_info.raw_problem", "reward_model.ground_truth"),
        once=True,  # it has each question 32 times
    ),
    "olympiadbench": Source(
        "Hothan/OlympiadBench",
        *("train", "question", "final_answer"),
        config="OE_TO_maths_en_COMP",  # English questions in mathematics with an answer, no image
    ),
    "minerva": Source("svc-huggingface/minerva-math", "test", "problem", "solution", boxed=True),
    "math": Source("HuggingFaceH4/MATH", "test", "problem", "solution", boxed=True),
}


def trainer_rows(name: str, source: Source, rows: Dataset) -> Dataset:
    """A data set in the columns that VeRL and OpenRLHF read.

    Both read `prompt`. VeRL takes the answer from `reward_model` and the benchmark from
    `data_source`, OpenRLHF from `answer` and `datasource`.

    Args:
        name: The data set's short name.
        source: Its columns.
        rows: Its rows.

    Returns:
        One row for each question with an answer.

    Raises:
        SystemExit: If a column is missing or no row is left.
        TokenWeightsError: If an answer is neither text nor a finite number.
    """
    columns = source.question, source.answer
    missing = {column.partition(".")[0] for column in columns} - set(rows.column_names)
    if missing:
        sys.exit(f"{name}: no column {sorted(missing)}; there are {rows.column_names}")
    written, seen = [], set()
    for index, row in enumerate(rows):
        question, answer = (field(row, column) for column in columns)
        answer = answer[0] if isinstance(answer, list) and answer else answer
        answer = boxed_answer(str(answer)) if source.boxed else answer
        if answer in (None, "", []) or (source.once and question in seen):
            continue
        seen.add(question)
        truth = reference_answer(answer, place=f"{name}, row {index}").strip("$ ")
        written.append(
            {
                "data_source": name,
                "datasource": name,
                "prompt": [{"role": "user", "content": f"{question.strip()}\n{INSTRUCTION}"}],
                "answer": truth,
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": truth},
                "extra_info": {"index": index, "split": source.split},
            }
        )
    if not written:
        sys.exit(f"{name}: no question with an answer among {len(rows)} rows")
    return Dataset.from_list(written)


def field(row: Any, path: str) -> Any:
    """What stands in a row under a column, or under a field of a column of fields."""
    for key in path.split("."):
        row = row[key]
    return row


def selective(rows: Dataset) -> Dataset:
    """The 40 % of a data set that the selective experiments read, in its order."""
    count = math.ceil(SELECTIVE * len(rows))
    return rows.select(sorted(random.Random(SEED).sample(range(len(rows)), count)))


def main(argv: list[str] | None = None) -> None:
    """Downloads, or reads, and writes two files for each data set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the parquet files go")
    parser.add_argument("--only", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--source", action="append", default=[], metavar="NAME=PATH")
    options = parser.parse_args(argv)
    places = dict(item.partition("=")[::2] for item in options.source)
    if unknown := set(places) - set(SOURCES):
        parser.error(f"unknown {sorted(unknown)}; known are {', '.join(SOURCES)}")
    (options.folder / "selective").mkdir(parents=True, exist_ok=True)
    for name in options.only:
        source = SOURCES[name]
        place = places.get(name, source.name)
        if Path(place).is_file():
            found = Dataset.from_parquet(place)
        else:
            found = load_dataset(place, source.config, data_files=source.files, split=source.split)
        rows = trainer_rows(name, source, found)
        for folder, part in (
            (options.folder, rows),
            (options.folder / "selective", selective(rows)),
        ):
            path = folder / f"{name}.parquet"
            part.to_parquet(path)
            print(f"{path}: {len(part)} questions of {len(found)} rows")


if __name__ == "__main__":
    main()
