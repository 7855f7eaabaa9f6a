"""Alignment of nested scores."""

import pytest
import torch
from batches import nested

from tokenweights_verl.scores import response_scores


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
