import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks

import tokenweights as tw
from tokenweights import TokenWeightsError


@given(masks(), st.integers(0, 1000))
def test_overlaps_agree_with_sets(mask, seed):
    generator = torch.Generator().manual_seed(seed)
    subsets = list(torch.rand(3, *mask.shape, generator=generator) < 0.5)
    jaccard = tw.subset_overlap(subsets, mask).jaccard
    sets = [set(map(tuple, (subset & mask).nonzero().tolist())) for subset in subsets]
    for i, one in enumerate(sets):
        for j, two in enumerate(sets):
            if one | two:
                assert jaccard[i, j] == len(one & two) / len(one | two)
            else:
                assert math.isnan(jaccard[i, j])
    pair = tw.partition_jaccard(subsets[0], subsets[2], mask)
    torch.testing.assert_close(pair, jaccard[0, 2], equal_nan=True)


def test_random_subsets_overlap_as_the_docstring_says():
    mask = torch.ones(4, 5000, dtype=torch.bool)
    first, second = (tw.random_fraction(mask, fraction=0.2, seed=seed) for seed in (0, 1))
    assert tw.partition_jaccard(first, second, mask).item() == pytest.approx(0.2 / 1.8, abs=0.01)


def test_no_subset_is_refused():
    with pytest.raises(TokenWeightsError, match="subsets"):
        tw.subset_overlap([], torch.ones(1, 1).bool())
