"""Numbers of responses and prompts."""

import torch

from tokenweights.recipes.identity import label_numbers, text_numbers


def test_equal_labels_have_one_number():
    assert label_numbers(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]
    assert label_numbers([]).shape == (0,)


def test_numbers_stay_with_their_responses():
    prompts = [torch.tensor([1, 2]), torch.tensor([1, 2]), torch.tensor([3])]
    responses = [torch.tensor([7]), torch.tensor([8, 9]), torch.tensor([7])]
    ids = text_numbers(5, prompts, responses).tolist()
    order = [2, 0, 1]
    moved = text_numbers(5, *([part[row] for row in order] for part in (prompts, responses)))
    assert moved.tolist() == [ids[row] for row in order]
    assert len(set(ids)) == 3 and min(ids) >= 0
    assert ids != text_numbers(6, prompts, responses).tolist()
    twice = text_numbers(5, prompts[:1] * 2, responses[:1] * 2).tolist()
    assert twice[0] != twice[1]
