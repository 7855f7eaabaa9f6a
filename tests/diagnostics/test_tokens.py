from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, score_stacks

import tokenweights as tw
from tokenweights import TokenWeightsError


@given(score_stacks(2, max_token=20, dtypes=FLOATS), st.integers(0, 1000))
def test_counts_agree_with_counters(case, seed):
    (first, second), mask = case
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 5, mask.shape, generator=generator)
    ids = torch.where(mask, ids, -100)  # as trainers pad
    quadrants = tw.median_quadrants(first, second, mask)
    got = tw.quadrant_tokens(ids, quadrants, vocab_size=5)
    total = int(mask.sum())
    for quadrant in range(4):
        counter = Counter(ids[quadrants == quadrant].tolist())
        expected = sorted(counter.items(), key=lambda pair: (-pair[1], pair[0]))
        assert got.most_frequent(quadrant) == expected
        assert got.most_frequent(quadrant, limit=2) == expected[:2]
        if total:
            assert got.share[quadrant].item() == pytest.approx(counter.total() / total)
        for token, count in expected:
            assert got.frequency[quadrant, token] == count / counter.total()


@pytest.mark.parametrize(
    "ids, quadrants, message",
    [
        ([[10]], [[0]], "Raise `vocab_size`"),
        ([[-1]], [[0]], "Raise `vocab_size`"),
        ([[1]], [[4]], "Raise `quadrant_count`"),
    ],
)
def test_nonsense_is_refused(ids, quadrants, message):
    with pytest.raises(TokenWeightsError, match=message):
        tw.quadrant_tokens(torch.tensor(ids), torch.tensor(quadrants), vocab_size=10)


def test_places_and_sizes_that_are_not_there_are_refused():
    ids, quadrants = torch.tensor([[0, 1]]), torch.tensor([[0, 1]])
    tokens = tw.quadrant_tokens(ids, quadrants, vocab_size=2)
    for call in (
        lambda: tokens.most_frequent(4),
        lambda: tokens.most_frequent(-1),
        lambda: tokens.most_frequent(0, limit=-1),
        lambda: tw.quadrant_tokens(ids, quadrants - 2, vocab_size=0),
        lambda: tw.quadrant_tokens(ids, quadrants, vocab_size=2, quadrant_count=0),
    ):
        with pytest.raises(TokenWeightsError):
            call()
    assert tokens.most_frequent(0, limit=0) == []
