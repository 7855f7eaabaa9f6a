"""Counter-based random keys: a function of seed, sample and position, and of nothing else.

A key does not depend on the layout of the batch, on the device, or on any generator's state, and
drawing one touches no global state. Nor does it depend on a compiler: 64-bit words are held as two
halves, so that no value ever leaves the range of int64. Arithmetic that wraps around would be
shorter, but compilers that reason about the ranges of integers do not keep it.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from tokenweights.masked import row_chunks

KEY_BITS = 53

Word = tuple[Tensor, Tensor]
"""Unsigned 64-bit numbers: their high and their low 32 bits, each in an int64."""


def random_keys(
    seed: int, sample_ids: Int[Tensor, " batch"], positions: Int[Tensor, "batch token"]
) -> Int[Tensor, "batch token"]:
    """Uniform integers in `[0, 2**53)`, one for each (seed, sample id, position)."""
    start = (seed + 1) * _GOLDEN
    high, low = _mixed(
        (sample_ids >> 32) + (start >> 32 & _HALF), (sample_ids & _HALF) + (start & _HALF)
    )
    keys = torch.empty_like(positions)
    for rows in row_chunks(positions.shape):
        steps = positions[rows] + 1
        upper, lower = _product((steps >> 32, steps & _HALF), _GOLDEN)
        top, bottom = _mixed(high[rows, None] + upper, low[rows, None] + lower)
        keys[rows] = top << (KEY_BITS - 32) | bottom >> (64 - KEY_BITS)
    return keys


def _mixed(high: Tensor, low: Tensor) -> Word:
    """The finalizer of SplitMix64."""
    word = _folded(_carried(high, low), 30)
    word = _folded(_product(word, 0xBF58476D1CE4E5B9), 27)
    return _folded(_product(word, 0x94D049BB133111EB), 31)


def _folded(word: Word, bits: int) -> Word:
    """The word XOR itself shifted right by fewer than 32 bits."""
    high, low = word
    return high ^ high >> bits, low ^ (low >> bits | high << (32 - bits) & _HALF)


def _product(word: Word, factor: int) -> Word:
    high, low = word
    upper, lower = _signed_halves(factor)
    return _carried((high * lower & _HALF) + (low * upper & _HALF), low * lower)


def _carried(high: Tensor, low: Tensor) -> Word:
    """The word `high * 2**32 + low`, modulo `2**64`."""
    return high + (low >> 32) & _HALF, low & _HALF


def _signed_halves(number: int) -> tuple[int, int]:
    """Halves in `[-2**31, 2**31)`: their products with 32 bits fit into an int64."""
    lower = (number + 2**31 & _HALF) - 2**31
    upper = ((number - lower >> 32) + 2**31 & _HALF) - 2**31
    return upper, lower


_HALF = 0xFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
