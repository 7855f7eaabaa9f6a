import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenweights import _errors
from tokenweights.rewards import boxed_match_reward

from tokenweights_lab.task import (
    MERGE_PROBABILITY,
    Problem,
    careful_solution,
    corpus_line,
    held_out,
    merged_lines,
    mixed_solution,
    problem,
    problems,
)

seeds = st.integers(0, 10**6)


def answer_of(prompt: str) -> str:
    """The answer, worked out from the prompt's text alone."""
    body, start = prompt.removesuffix(">").split("?")
    signed = [int(term) for term in re.findall(r"[+-]\d", body)]
    last = (int(start) + sum(signed)) % 10
    return f"{(last - signed[-1]) % 10}{last}"


def solution_lines(completion: str) -> list[str]:
    return re.findall(r"(?:[a-z][+-]\d)+=\d", completion)


def test_answer_of_the_worked_example():
    assert answer_of("a-0b-8c-6d-7e-9f+8?6>") == "64"
    example = Problem("a-0b-8c-6d-7e-9f+8?6>", "64", 6, ("-0", "-8", "-6", "-7", "-9", "+8"))
    assert example.totals == (6, 8, 2, 5, 6, 4)
    assert careful_solution(example) == r"a-0=6b-8=8c-6=2d-7=5e-9=6f+8=4\boxed{64}"


@given(seeds, seeds, st.integers(3, 14), st.booleans())
def test_answer_agrees_with_an_independent_solver(seed, index, count, evaluation):
    drawn = problem(seed, index, terms=(count, count), evaluation=evaluation)
    assert len(drawn.terms) == count
    assert drawn.answer == answer_of(drawn.prompt)
    assert held_out(drawn.prompt) == evaluation
    assert boxed_match_reward(careful_solution(drawn), drawn.answer) == 1.0


@given(seeds, seeds, st.sampled_from(["careful", "mixed"]))
def test_corpus_lines_write_every_term_once_and_in_order(seed, index, style):
    line = corpus_line(seed, index, terms=(3, 14), style=style)
    lines = solution_lines(line.completion)
    assert "".join(re.sub(r"=\d", "", x) for x in lines) == line.prompt.split("?")[0]
    assert all(len(x) == 5 for x in lines[-2:])
    assert line.completion.endswith(rf"\boxed{{{lines[-2][-1]}{lines[-1][-1]}}}")
    assert not held_out(line.prompt)


@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_slips_happen_on_merged_lines_only_and_add_one(seed, merge, slip):
    drawn = problem(seed, 0)
    text = mixed_solution(drawn, seed, 1, merge_probability=merge, slip_probability=slip)
    total, slips = drawn.start, 0
    for line in solution_lines(text):
        terms, written = line.split("=")
        total += sum(int(term) for term in re.findall(r"[+-]\d", terms))
        difference = (int(written) - total) % 10
        assert difference in ((0, 1) if len(terms) > 3 else (0,))
        slips += difference
        total += difference
    assert (boxed_match_reward(text, drawn.answer) == 1.0) == (slips == 0)


def test_mixed_solutions_without_merges_are_careful():
    for drawn in problems("train", 20, seed=3):
        assert mixed_solution(drawn, 0, 0, merge_probability=0.0) == careful_solution(drawn)


def test_merge_rate_matches_its_probability():
    # Four terms leave one chance: a careful first line leaves no room for a merged second one.
    merged = [
        merged_lines(corpus_line(5, index, terms=(4, 4), style="mixed").completion) > 0
        for index in range(2000)
    ]
    assert abs(sum(merged) / len(merged) - MERGE_PROBABILITY) < 0.05


def test_merged_lines_counts_terms_without_a_total():
    assert merged_lines(r"a-0=6b-8=8\boxed{68}") == 0
    assert merged_lines(r"a-0b-8=8c+1d+1=0e-1=9f-1=8\boxed{98}") == 2
    assert merged_lines("a-0b") == 1


def test_splits_share_no_prompt():
    train = {p.prompt for seed in range(4) for p in problems("train", 500, seed=seed)}
    short = {problem(seed, i, terms=(5, 7)).prompt for seed in range(4) for i in range(500)}
    for split in ("easy", "hard"):
        for seed in range(4):
            evaluation = {p.prompt for p in problems(split, 500, seed=seed)}
            assert not evaluation & (train | short)
            assert all(map(held_out, evaluation))


def test_splits_have_their_numbers_of_terms():
    counts = {
        split: {len(p.terms) for p in problems(split, 300)} for split in ("train", "easy", "hard")
    }
    assert counts == {"train": set(range(5, 15)), "easy": {5, 6, 7}, "hard": {12, 13, 14}}


def test_held_out_share_is_about_an_eighth():
    share = sum(held_out(f"a+1?{i}>") for i in range(4000)) / 4000
    assert abs(share - 1 / 8) < 0.03


def test_problems_are_deterministic_and_leave_the_global_state():
    state = random.getstate()
    first = problems("hard", 10, seed=2)
    assert problems("hard", 4, seed=2) == first[:4]
    assert problems("hard", 10, seed=3) != first
    assert random.getstate() == state


def test_a_known_draw_stays_the_same():
    assert problem(0, 0).prompt == "a-6b-3c-2d-1e+0f-5g+9h-7i+3?2>"


@pytest.mark.parametrize("terms", [(2, 5), (5, 15), (7, 6)])
def test_impossible_numbers_of_terms_are_refused(terms):
    with pytest.raises(_errors.TokenWeightsError, match="`terms`"):
        problem(0, 0, terms=terms)


def test_largest_digit():
    drawn = [problem(1, i, largest_digit=2) for i in range(50)]
    assert {int(t[1]) for p in drawn for t in p.terms} == {0, 1, 2}
    with pytest.raises(_errors.TokenWeightsError, match="`largest_digit`"):
        problem(0, 0, largest_digit=0)
