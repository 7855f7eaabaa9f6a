"""Alignment of nested scores, and sample ids."""

import pytest
import torch
from batches import nested

from tokenweights_verl.scores import response_scores, sample_ids


@pytest.mark.parametrize(("alignment", "shift"), [("deciding", 1), ("own", 0)])
def test_rows_of_their_own_lengths(alignment, shift):
    prompts, lengths = (3, 1, 5), (2, 4, 1)
    widths = [prompt + length for prompt, length in zip(prompts, lengths, strict=True)]
    rows = [torch.arange(width) + 100.0 * row for row, width in enumerate(widths)]
    masks = [torch.ones(n, dtype=torch.long) for n in lengths]
    found = response_scores(nested(rows), nested(masks), alignment=alignment)
    assert found.shape == (3, 4)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        expected = 100.0 * row + torch.arange(prompt - shift, prompt - shift + length)
        assert torch.equal(found[row, :length], expected)
        assert not found[row, length:].any()


def test_sample_ids_stay_with_their_responses():
    prompts = [torch.tensor([1, 2]), torch.tensor([1, 2]), torch.tensor([3])]
    responses = [torch.tensor([7]), torch.tensor([8, 9]), torch.tensor([7])]
    ids = sample_ids(5, nested(prompts), nested(responses)).tolist()
    order = [2, 0, 1]
    moved = sample_ids(
        5, nested([prompts[row] for row in order]), nested([responses[row] for row in order])
    )
    assert moved.tolist() == [ids[row] for row in order]
    assert len(set(ids)) == 3 and min(ids) >= 0
    assert ids != sample_ids(6, nested(prompts), nested(responses)).tolist()
    twice = sample_ids(5, nested(prompts[:1] * 2), nested(responses[:1] * 2)).tolist()
    assert twice[0] != twice[1]
