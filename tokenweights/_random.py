"""Counter-based random keys: a function of seed, sample and position, and of nothing else.

A key does not depend on the layout of the batch, on the device, or on any generator's state, and
drawing one touches no global state.
"""

from jaxtyping import Int
from torch import Tensor

KEY_BITS = 53


def random_keys(
    seed: int, sample_ids: Int[Tensor, " batch"], positions: Int[Tensor, "batch token"]
) -> Int[Tensor, "batch token"]:
    """Uniform integers in `[0, 2**53)`, one for each (seed, sample id, position)."""
    stream = _mixed(sample_ids + _signed(seed * _GOLDEN))
    return _shifted(_mixed(stream[:, None] + positions * _GOLDEN), 64 - KEY_BITS)


def _mixed(values: Tensor) -> Tensor:
    """The finalizer of SplitMix64, in int64 arithmetic that wraps around."""
    values = values + _GOLDEN
    values = (values ^ _shifted(values, 30)) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ _shifted(values, 27)) * _signed(0x94D049BB133111EB)
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Logical right shift, which torch's arithmetic shift of signed integers is not."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
