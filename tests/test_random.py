import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenweights._random import random_keys

WORDS = st.integers(-(2**63), 2**63 - 1)
MODULUS, GOLDEN = 2**64, 0x9E3779B97F4A7C15


def split_mix(word: int) -> int:
    """SplitMix64 of Steele, Lea and Flood, in integers without a bound."""
    word = (word + GOLDEN) % MODULUS
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % MODULUS
    word = (word ^ word >> 27) * 0x94D049BB133111EB % MODULUS
    return word ^ word >> 31


@given(st.integers(-(2**70), 2**70), st.lists(WORDS, max_size=5), st.integers(-1, 2**62))
def test_keys_are_those_of_unbounded_integers(seed, sample_ids, first):
    positions = torch.arange(first, first + 3).expand(len(sample_ids), 3)
    keys = random_keys(seed, torch.tensor(sample_ids, dtype=torch.long), positions)
    for sample_id, row in zip(sample_ids, keys.tolist(), strict=True):
        stream = split_mix(sample_id + seed * GOLDEN)
        places = range(first, first + 3)
        assert row == [split_mix(stream + place * GOLDEN) >> 11 for place in places]


def test_a_key_of_the_published_sequence():
    # The first output of SplitMix64 from state 0 is 0xE220A8397B1DCDAF.
    assert split_mix(0) == 0xE220A8397B1DCDAF


def test_chunks_of_rows_make_no_difference(monkeypatch):
    arguments = 3, torch.arange(5), torch.arange(7).expand(5, 7)
    whole = random_keys(*arguments)
    monkeypatch.setattr("tokenweights.masked.CHUNK_TOKENS", 14)
    assert torch.equal(random_keys(*arguments), whole)
