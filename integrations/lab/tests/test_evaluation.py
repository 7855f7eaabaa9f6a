import random

import pytest
import torch
from tokenweights import _errors

from tokenweights_lab.evaluation import accuracy, completions
from tokenweights_lab.policy import load_policy, load_tokenizer, untrained_policy
from tokenweights_lab.task import problems

MODEL, TOKENIZER = load_policy(), load_tokenizer()
PROMPTS = [problem.prompt for problem in problems("easy", 4, seed=9)]


def test_completions_depend_on_the_seed_alone():
    first = completions(MODEL, TOKENIZER, PROMPTS, samples=3, seed=1)
    torch.manual_seed(12)
    assert completions(MODEL, TOKENIZER, PROMPTS, samples=3, seed=1) == first
    assert completions(MODEL, TOKENIZER, PROMPTS, samples=3, seed=2) != first
    assert [len(row) for row in first] == [3, 3, 3, 3]


def test_the_global_random_state_and_the_mode_are_untouched():
    state, python_state = torch.get_rng_state(), random.getstate()
    model = load_policy().train()
    completions(model, TOKENIZER, PROMPTS[:1], max_new_tokens=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    assert model.training


def test_the_mode_is_restored_after_an_error():
    model = load_policy().train()
    with pytest.raises(Exception, match="UNK"):
        completions(model, TOKENIZER, ["A"])
    assert model.training


def test_greedy_completions_do_not_depend_on_padding():
    together = completions(MODEL, TOKENIZER, PROMPTS, temperature=0.0)
    apart = [completions(MODEL, TOKENIZER, [prompt], temperature=0.0)[0] for prompt in PROMPTS]
    assert together == apart


def test_completions_group_samples_by_prompt():
    rows = completions(MODEL, TOKENIZER, PROMPTS, samples=2, batch_size=3)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert all(text[:3] == prompt[:3] for text in row)


def test_right_padding_is_refused():
    tokenizer = load_tokenizer()
    tokenizer.padding_side = "right"
    with pytest.raises(_errors.TokenWeightsError, match="pad on the left"):
        completions(MODEL, tokenizer, PROMPTS)


def test_accuracy_counts_right_boxes(monkeypatch):
    drawn = problems("easy", 2, seed=4)
    right = [rf"\boxed{{{problem.answer}}}" for problem in drawn]
    texts = [[right[0], r"a+1b+1=2\boxed{}"], ["", right[0] + "x" + right[1]]]
    monkeypatch.setattr("tokenweights_lab.evaluation.completions", lambda *_, **__: texts)
    result = accuracy(MODEL, TOKENIZER, drawn, samples=2)
    assert result.mean_at_k == 0.5
    assert result.pass_at_k == 1.0
    assert result.boxed_share == 0.75
    assert result.merged_share == 0.25
    assert (result.samples, result.problems) == (2, 2)


def test_the_policy_beats_an_untrained_one_and_leaves_room():
    drawn = problems("easy", 16, seed=5)
    trained = accuracy(MODEL, TOKENIZER, drawn, samples=4)
    assert 0.2 < trained.mean_at_k < 0.8
    assert trained.boxed_share > 0.9
    assert 0.1 < trained.merged_share
    untrained = accuracy(untrained_policy(), TOKENIZER, drawn, samples=1, max_new_tokens=8)
    assert untrained.mean_at_k == 0.0
