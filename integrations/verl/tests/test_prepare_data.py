"""Data preparation, on local files with the columns of the public data sets."""

import importlib.util
from pathlib import Path

import pytest
from datasets import Dataset
from tokenweights import TokenWeightsError

SCRIPT = Path(__file__).parents[1] / "examples" / "prepare_data.py"


@pytest.fixture(scope="module")
def prepare_data():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_in_the_columns_that_verl_reads(prepare_data, tmp_path):
    rows = {
        "problem": [" What is 1+1? ", "easy", "no box"],
        "level": ["Level 4", "Level 1", "Level 5"],
        "solution": [r"It is \boxed{2}.", r"\boxed{1}", "three"],
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "source.parquet")
    source = f"math_3to5={tmp_path / 'source.parquet'}"
    prepare_data.main([str(tmp_path / "out"), "--only", "math_3to5", "--source", source])
    (row,) = Dataset.from_parquet(str(tmp_path / "out" / "math_3to5.parquet"))
    assert row["data_source"] == "math_3to5"
    assert row["reward_model"]["ground_truth"] == "2"
    (message,) = row["prompt"]
    assert message["role"] == "user"
    assert message["content"] == f"What is 1+1?\n{prepare_data.INSTRUCTION}"


def test_answers_in_lists_and_dollars(prepare_data):
    source = prepare_data.SOURCES["olympiadbench"]
    rows = Dataset.from_dict({"question": ["q", "r"], "final_answer": [["$x^2$"], []]})
    (row,) = prepare_data.verl_rows("olympiadbench", source, rows)
    assert row["reward_model"]["ground_truth"] == "x^2"


def test_answers_that_are_numbers(prepare_data):
    source = prepare_data.SOURCES["aime_2024"]
    rows = Dataset.from_dict({"problem": ["q", "r", "s"], "answer": [7.0, None, 0.5]})
    written = prepare_data.verl_rows("aime_2024", source, rows)
    assert [row["reward_model"]["ground_truth"] for row in written] == ["7", "0.5"]
    rows = Dataset.from_dict({"problem": ["q", "r"], "answer": [7.0, float("nan")]})
    with pytest.raises(TokenWeightsError, match=r"got nan \(aime_2024, row 1\)"):
        prepare_data.verl_rows("aime_2024", source, rows)


def test_nonsense_is_named(prepare_data, tmp_path, capsys):
    rows = Dataset.from_dict({"text": ["q"]})
    with pytest.raises(SystemExit, match=r"minerva: no column \['answer', 'question'\]"):
        prepare_data.verl_rows("minerva", prepare_data.SOURCES["minerva"], rows)
    with pytest.raises(SystemExit):
        prepare_data.main([str(tmp_path), "--source", "maths=x"])
    assert "unknown ['maths']" in capsys.readouterr().err


def test_every_file_of_the_configurations_is_written(prepare_data):
    from configured import composed

    data = composed("+experiment=paper").data
    named = {Path(path).stem for path in (*data.train_files, *data.val_files)}
    assert named == set(prepare_data.SOURCES)
