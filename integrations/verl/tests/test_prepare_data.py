"""Data preparation, on local files with the columns of the public data sets."""

import importlib.util
from pathlib import Path

import pytest
from configured import composed
from datasets import Dataset
from tokenweights import TokenWeightsError

SCRIPT = Path(__file__).parents[2] / "prepare_data.py"
if not SCRIPT.is_file():
    reason = "the script lies beside the adapters, not in one's source distribution"
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def prepare_data():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(prepare_data, name, rows):
    return list(
        prepare_data.trainer_rows(name, prepare_data.SOURCES[name], Dataset.from_list(rows))
    )


def test_rows_in_the_columns_that_trainers_read(prepare_data, tmp_path):
    rows = {
        "problem": [" What is 1+1? ", "no box"],
        "solution": [r"It is \boxed{2}.", "three"],
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "source.parquet")
    source = f"math={tmp_path / 'source.parquet'}"
    prepare_data.main([str(tmp_path / "out"), "--only", "math", "--source", source])
    for folder in ("out", "out/selective"):
        (row,) = Dataset.from_parquet(str(tmp_path / folder / "math.parquet"))
        assert row["data_source"] == row["datasource"] == "math"
        assert row["reward_model"]["ground_truth"] == row["answer"] == "2"
        (message,) = row["prompt"]
        assert message["role"] == "user"
        assert message["content"] == f"What is 1+1?\n{prepare_data.INSTRUCTION}"


def test_the_selective_part_is_four_tenths_of_the_rows_in_their_order(prepare_data):
    rows = Dataset.from_dict({"index": range(1001)})
    kept = prepare_data.selective(rows)["index"]
    assert len(kept) == 401 and list(kept) == sorted(set(kept))
    assert list(kept) == list(prepare_data.selective(rows)["index"])
    assert 400 < sum(kept) / len(kept) < 600  # not the first ones


def test_answers_in_lists_and_dollars(prepare_data):
    rows = [{"question": "q", "final_answer": ["$x^2$"]}, {"question": "r", "final_answer": []}]
    (row,) = written(prepare_data, "olympiadbench", rows)
    assert row["reward_model"]["ground_truth"] == "x^2"


def test_questions_that_repeat_count_once(prepare_data):
    rows = [
        {"extra_info": {"raw_problem": question}, "reward_model": {"ground_truth": answer}}
        for question, answer in [("q", "7"), ("r", "8")] * 32
    ]
    found = written(prepare_data, "aime_2024", rows)
    assert [row["answer"] for row in found] == ["7", "8"]
    # No other data set loses a question, since the paper filters none.
    assert len(written(prepare_data, "deepscaler", [{"problem": "q", "answer": "7"}] * 2)) == 2


def test_answers_that_are_numbers(prepare_data):
    def rows(*answers):
        return [{"problem": "q", "answer": answer} for answer in answers]

    found = written(prepare_data, "deepscaler", rows(7.0, None, 0.5))
    assert [row["reward_model"]["ground_truth"] for row in found] == ["7", "0.5"]
    with pytest.raises(TokenWeightsError, match=r"got nan \(deepscaler, row 1\)"):
        written(prepare_data, "deepscaler", rows(7.0, float("nan")))


def test_nonsense_is_named(prepare_data, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"minerva: no column \['problem', 'solution'\]"):
        written(prepare_data, "minerva", [{"text": "q"}])
    with pytest.raises(SystemExit):
        prepare_data.main([str(tmp_path), "--source", "maths=x"])
    assert "unknown ['maths']" in capsys.readouterr().err


@pytest.mark.parametrize("experiment", ["qwen3_8b_base", "qwen3_8b_base_selective"])
def test_every_file_of_the_configurations_is_written(prepare_data, experiment):
    data = composed(f"+experiment={experiment}").data
    named = [Path(path) for path in (*data.train_files, *data.val_files)]
    assert {path.stem for path in named} == set(prepare_data.SOURCES)
    folder = "data/selective" if experiment.endswith("selective") else "data"
    assert {str(path.parent) for path in named} == {folder}
