import fractions
import itertools
import math
import random
import sys
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenweights as tw
from tokenweights import TokenWeightsError


@pytest.mark.parametrize(
    ("response", "content"),
    [
        (r"\boxed{42}", "42"),
        (r"so \boxed{ 42 } .", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\\}", "a\\\\"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{{}", None),
        (r"\boxed{1\}", None),
        (r"\boxed 5", None),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_boxed_answer(response, content):
    assert tw.boxed_answer(response) == content


FRAGMENTS = [
    *(
        "{",
        "}",
        "\\",
        "\\{",
        "\\}",
        "\\\\",
        "{}",
        "}{",
        "{{",
        "a",
        " ",
        "\n",
        "\u00e9",
        "\U0001d465",
        "\ud83d",
    ),
    *(
        "\\boxed{",
        "\\boxed",
        "boxed{",
        "\\boxed{{",
        "\\boxed{a}",
        "\\boxed{{}",
        "\\\\boxed{",
        "\\fbox{",
    ),
]


def read_again_for_every_box(text):
    """The same value from a reading to the end of the text for every box: quadratic, and plain."""
    box = "\\boxed{"
    for start in range(len(text) - len(box), -1, -1):
        if not text.startswith(box, start):
            continue
        depth, place = 1, start + len(box)
        while place < len(text):
            if text[place] == "\\":
                place += 1
            elif text[place] in "{}":
                depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[start + len(box) : place].strip()
            place += 1
    return None


@given(st.integers(0, 2**32))
def test_the_last_closed_box_is_found_in_any_text(seed):
    generator = random.Random(seed)
    found = set()
    for _ in range(200):
        text = "".join(generator.choices(FRAGMENTS, k=generator.randint(0, 30)))
        expected = read_again_for_every_box(text)
        assert tw.boxed_answer(text) == expected, text
        found.add(expected)
    assert None in found and len(found) > 2


@pytest.mark.parametrize("unit", ["{}", "{{}}", "}{", "{", "\\{", "a", "\U0001d465"])
@pytest.mark.parametrize("count", [2047, 2048, 4095, 4096, 10_000])
def test_a_long_box_is_read_to_its_end(unit, count):
    for end in ("}", "}}", "{}}", "", "{"):
        text = "\\boxed{" + unit * count + end
        assert tw.boxed_answer(text) == read_again_for_every_box(text)


def work(function, *arguments):
    """Lines that Python runs in this library, and the characters that its functions are given."""
    count = 0

    def traced(frame, event, _):
        nonlocal count
        if not frame.f_code.co_filename.endswith("rewards.py"):
            return None
        count += 1
        if event == "call":
            given = frame.f_locals.values()
            count += sum(len(value) for value in given if isinstance(value, str))
        return traced

    before = sys.gettrace()
    sys.settrace(traced)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("unit", FRAGMENTS)
@pytest.mark.parametrize(("before", "after"), [("", ""), ("\\boxed{", ""), ("\\boxed{{", "}")])
def test_work_is_linear_whatever_a_policy_repeats(unit, before, after):
    small, large = (before + unit * count + after for count in (200, 2000))
    assert work(tw.boxed_answer, large) < 11 * work(tw.boxed_answer, small)


@given(st.text(alphabet="ab{}\\ 1boxed"), st.text(alphabet="ab1", min_size=1))
def test_a_box_at_the_end_always_counts(prefix, answer):
    # An odd run of backslashes before the box would escape its own backslash.
    assert tw.boxed_answer(prefix + " \\boxed{" + answer + "}") == answer
    assert tw.boxed_match_reward(prefix + " \\boxed{" + answer + "}", f" {answer}\n") == 1.0


def test_rewards_of_the_paper():
    assert tw.boxed_match_reward(r"\boxed{42}", "42") == 1
    assert tw.boxed_match_reward(r"\boxed{42.0}", "42") == -1
    assert tw.boxed_match_reward("42", "42") == -2


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("7", "7"),
        (" 7.0\n", "7.0"),
        (7, "7"),
        (7.0, "7"),
        (-2.0, "-2"),
        (-0.0, "0"),
        (0.5, "0.5"),
        (1e-7, "0.0000001"),
        (2.0**53 - 1, "9007199254740991"),
        (10**30, "1" + "0" * 30),
        (np.int32(7), "7"),
        (np.uint8(7), "7"),
        (np.float64(7), "7"),
        (np.float32(0.1), "0.1"),
        (np.float16(-0.5), "-0.5"),
        (np.str_("x^2"), "x^2"),
        (Decimal("7.00"), "7"),
        (Decimal("1E+2"), "100"),
        (Decimal("12345678901234567890.5"), "12345678901234567890.5"),
        (fractions.Fraction(1, 2), "1/2"),
        (fractions.Fraction(4, 2), "2"),
    ],
    ids=repr,
)
def test_an_answer_is_what_a_policy_would_write(answer, text):
    assert tw.reference_answer(answer) == text
    assert tw.boxed_match_reward(rf"\boxed{{{text}}}", answer) == 1.0
    assert tw.boxed_match_reward(r"\boxed{x}", answer) == -1.0


@pytest.mark.parametrize(
    "answer",
    [
        *(None, "", " \n", True, False, np.bool_(True), b"7", 1j, [], ["7"], {"7": 7}),
        *(math.nan, math.inf, -math.inf, np.float32("nan"), Decimal("nan"), Decimal("-inf")),
        *(2.0**53, -1e300, np.float64(1e23)),
    ],
    ids=repr,
)
def test_what_cannot_be_an_answer_is_refused(answer):
    with pytest.raises(
        TokenWeightsError, match=r"`reference_answer`: expected `answer` .*\(row 3\)"
    ):
        tw.reference_answer(answer, place="row 3")
    for response in (r"\boxed{7}", "no box", r"\boxed{}", r"\boxed{None}"):
        with pytest.raises(TokenWeightsError, match="`reference_answer`"):
            tw.boxed_match_reward(response, answer)


@given(st.floats(-(2**53) + 1, 2**53 - 1))
def test_a_number_comes_back_from_its_text(number):
    text = tw.reference_answer(number)
    assert float(text) == number and "e" not in text
    assert tw.reference_answer(int(number)) == str(int(number))


def test_overlong_penalty_of_dapo_by_hand():
    lengths = torch.tensor([0, 16384, 18432, 20480, 22528])
    penalty = tw.overlong_penalty(lengths, max_length=20480, buffer_length=4096, factor=0.5)
    assert penalty.tolist() == [0.0, 0.0, -0.25, -0.5, -0.75]


@pytest.mark.parametrize("length", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_overlong_penalty_of_any_length_and_default_dtype(length, default):
    lengths = torch.tensor([0, 100, 127], dtype=length)
    options = {"max_length": 100_000, "buffer_length": 99_970, "factor": 0.7}
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        penalty = tw.overlong_penalty(lengths, **options)
    finally:
        torch.set_default_dtype(before)
    expected = torch.tensor([0, (30 - 100) / 99_970 * 0.7, (30 - 127) / 99_970 * 0.7])
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, expected, rtol=3e-7, atol=0)


def test_mean_at_k():
    correct = torch.tensor([[True, False, False, True], [False, False, False, False]])
    assert tw.mean_at_k(correct) == 0.25


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1), st.integers(1, 5))
def test_pass_at_k_counts_the_subsets_with_a_right_response(rows, k):
    draws = list(itertools.combinations(range(5), k))
    expected = sum(any(row[i] for i in draw) for row in rows for draw in draws)
    value = tw.pass_at_k(torch.tensor(rows), k=k)
    assert value == pytest.approx(expected / len(draws) / len(rows))
    if k == 1:
        assert value == pytest.approx(tw.mean_at_k(torch.tensor(rows)))


def test_majority_at_k_by_hand():
    answers = [["1", "1", "2"], ["1", "2", None], [None, None, None], ["3", "2", "2"]]
    assert tw.majority_at_k(answers, ["1", "2", "1", "3"]) == (1 + 0.5 + 0 + 0) / 4


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        values = (torch.rand(40, generator=generator) < 0.6).float()
        interval = tw.bootstrap_interval(values, confidence=0.9, resamples=500, seed=seed)
        assert interval.low <= interval.mean <= interval.high
        covered += interval.low <= 0.6 <= interval.high
    assert 0.82 * 200 <= covered <= 0.97 * 200


def test_bootstrap_intervals_are_those_of_one_draw_of_all_resamples():
    values = torch.rand(3000, generator=torch.Generator().manual_seed(1))
    draws = torch.randint(3000, (2000, 3000), generator=torch.Generator().manual_seed(7))
    means = values.double()[draws].mean(-1)
    interval = tw.bootstrap_interval(values, resamples=2000, seed=7)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    assert [interval.low, interval.high] == means.quantile(ends).tolist()


def test_bootstrap_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    first = tw.bootstrap_interval(torch.tensor([0.1, 0.5]))
    assert first == tw.bootstrap_interval(torch.tensor([0.1, 0.5]))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "make",
    [
        lambda: tw.overlong_penalty(torch.tensor([1]), max_length=10, buffer_length=0),
        lambda: tw.overlong_penalty(torch.tensor([1]), max_length=10, buffer_length=11),
        lambda: tw.overlong_penalty(torch.tensor([1]), max_length=9, buffer_length=1, factor=-1.0),
        lambda: tw.overlong_penalty(
            torch.tensor([1]), max_length=9, buffer_length=1, factor=float("nan")
        ),
        lambda: tw.mean_at_k(torch.zeros(0, 8, dtype=torch.bool)),
        lambda: tw.pass_at_k(torch.zeros(0, 8, dtype=torch.bool), k=1),
        lambda: tw.pass_at_k(torch.zeros(1, 8, dtype=torch.bool), k=9),
        lambda: tw.majority_at_k([["1"]], []),
        lambda: tw.majority_at_k([], []),
        lambda: tw.bootstrap_interval(torch.zeros(0)),
        lambda: tw.bootstrap_interval(torch.tensor([float("nan")])),
        lambda: tw.bootstrap_interval(torch.zeros(2), confidence=1.0),
        lambda: tw.bootstrap_interval(torch.zeros(2), resamples=0),
        lambda: tw.bootstrap_interval(torch.zeros(2), resamples=2**70),
        lambda: tw.bootstrap_interval(torch.zeros(2), seed=2**64),
        lambda: tw.bootstrap_interval(torch.zeros(2), seed=-(2**63) - 1),
        lambda: tw.overlong_penalty(torch.tensor([1]), max_length=2**70, buffer_length=1),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(TokenWeightsError):
        make()
