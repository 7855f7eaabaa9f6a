import itertools

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


@given(st.text(alphabet="ab{}\\ 1boxed"), st.text(alphabet="ab1", min_size=1))
def test_a_box_at_the_end_always_counts(prefix, answer):
    # An odd run of backslashes before the box would escape its own backslash.
    assert tw.boxed_answer(prefix + " \\boxed{" + answer + "}") == answer
    assert tw.boxed_match_reward(prefix + " \\boxed{" + answer + "}", f" {answer}\n") == 1.0


def test_rewards_of_the_paper():
    assert tw.boxed_match_reward(r"\boxed{42}", "42") == 1
    assert tw.boxed_match_reward(r"\boxed{42.0}", "42") == -1
    assert tw.boxed_match_reward("42", "42") == -2


def test_overlong_penalty_of_dapo_by_hand():
    lengths = torch.tensor([0, 16384, 18432, 20480, 22528])
    penalty = tw.overlong_penalty(lengths, max_length=20480, buffer_length=4096, factor=0.5)
    assert penalty.tolist() == [0.0, 0.0, -0.25, -0.5, -0.75]


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
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(TokenWeightsError):
        make()
