"""Reward functions of the command line: boxed match, numbers, import paths."""

import pytest
from datasets import Dataset
from tokenweights import TokenWeightsError

from tokenweights_trl.arguments import TrainArguments
from tokenweights_trl.rewards import RESERVED_COLUMNS, compared, number_of, reward_functions


def boxed_reward(arguments, dataset, *, max_completion_length):
    (function,) = reward_functions(arguments, dataset, max_completion_length=max_completion_length)
    return function


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


NUMBERS = {
    "18": "18",
    "#### 18": "18",
    "He pays 3 * 6 = <<3*6=18>>18 dollars.\n#### 1,018": "1018",
    "#### 18 and then 19": "18",
    "#### none": None,
    "The answer is $1,234.50.": "1234.50",
    "from 7 to \u22123": "-3",
    r"12, so \boxed{-0.5}, in 3 steps": "-0.5",
    r"\boxed{x} or 7": None,
    ".5": ".5",
    "nothing": None,
    "": None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_the_number_is_the_last_one_or_the_marked_one(text):
    found, right = number_of(text), NUMBERS[text]
    assert found == (None if right is None else pytest.approx(type(found)(right)))


def test_numeric_match_compares_numbers_of_both_forms():
    arguments = TrainArguments(reward_funcs=["numeric_match"])
    dataset = rows_with(["6 * 3 = 18 #### 1,018", "#### -2"])
    (reward,) = reward_functions(arguments, dataset, max_completion_length=8)
    assert reward.__name__ == "numeric_match"
    completions = ["so 1018.0", [{"role": "assistant", "content": "#### 2"}], "?", "it is 1,018."]
    answers = [*dataset["answer"], *dataset["answer"][:1] * 2]
    rewards = reward(completions=completions, completion_ids=[[0]] * 4, answer=answers)
    assert rewards == [1.0, -1.0, -2.0, 1.0]


def test_answers_that_a_reward_could_never_find_are_refused():
    with pytest.raises(TokenWeightsError, match="reward_funcs numeric_match` reads"):
        reward_functions(TrainArguments(), rows_with(["4", "#### 4"]), max_completion_length=8)
    arguments = TrainArguments(reward_funcs=["numeric_match"])
    with pytest.raises(TokenWeightsError, match=r"with a number, got 'Paris' \(row 1"):
        reward_functions(arguments, rows_with(["4", "Paris"]), max_completion_length=8)


def test_what_was_compared_is_said():
    assert compared("boxed_match", r"\boxed{4}", "5") == "'4' with the answer '5'"
    assert compared("boxed_match", "4", "5") == r"no \boxed{} with the answer '5'"
    assert compared("numeric_match", "4", "2+3 #### 5") == "'4' with the answer '5'"
    assert compared("numeric_match", "?", "5") == "no number with the answer '5'"


@pytest.mark.parametrize("separator", [":", "."])
def test_functions_of_ones_own_come_from_the_working_directory(tmp_path, monkeypatch, separator):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # undoes what the import adds
    module = f"own_{'colon' if separator == ':' else 'dot'}"
    (tmp_path / f"{module}.py").write_text("def length(completions, **_): return [7.0]")
    arguments = TrainArguments(
        reward_funcs=[f"{module}{separator}length", "boxed_match", "think_format_reward"]
    )
    functions = reward_functions(arguments, rows_with(["4"]), max_completion_length=8)
    assert [f.__name__ for f in functions] == ["length", "boxed_match", "think_format_reward"]
    assert functions[0](completions=["x"]) == [7.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("boxed_mach", "Did you mean 'boxed_match'"),
        ("own_missing:f", r"a module that imports, got own_missing:f \(ModuleNotFoundError"),
        ("json:dmups", "Did you mean 'dumps'"),
        ("json:__name__", "a function in json"),
    ],
)
def test_a_reward_that_is_not_there_is_named(name, message):
    with pytest.raises(TokenWeightsError, match=message):
        reward_functions(
            TrainArguments(reward_funcs=[name]), rows_with(["4"]), max_completion_length=8
        )


def test_the_overlong_penalty_belongs_to_a_matching_reward():
    arguments = TrainArguments(reward_funcs=["json:dumps"], overlong_buffer=2)
    with pytest.raises(TokenWeightsError, match="0 unless the first of `reward_funcs`"):
        reward_functions(arguments, rows_with(["4"]), max_completion_length=8)
