"""The least time that the hardware allows, and where it comes from.

For every visible pair of query and key, every head costs `2 dim` floating-point operations and one
exponential; nothing else grows with `heads x token x token`. Matrix units and the units of the
exponential work at the same time, so the floor of one pass is the larger of both times. With the
log-sum-exp unknown there are two passes. Memory traffic is left out: queries, keys and results
are read and written once, which is far less.
"""

import time
from dataclasses import dataclass

import torch

# Exponentials per clock and multiprocessor on NVIDIA GPUs of compute capability 8.0 to 10.0.
EXPONENTIALS_PER_CLOCK = 16


@dataclass(frozen=True)
class Rates:
    """What the device reaches, per second."""

    products: float
    exponentials: float


@dataclass(frozen=True)
class Floor:
    """Seconds of one pass, by what they are spent on."""

    products: float
    exponentials: float

    @property
    def seconds(self) -> float:
        """The floor of one pass."""
        return max(self.products, self.exponentials)


def floor(tokens: int, heads: int, dim: int, rates: Rates) -> Floor:
    """One causal pass over all pairs of a sequence."""
    pairs = tokens * (tokens + 1) / 2
    return Floor(
        products=2 * pairs * heads * dim / rates.products,
        exponentials=pairs * heads / rates.exponentials,
    )


def measured_rates(device: torch.device, dtype: torch.dtype, clock: float) -> Rates:
    """The rate of a large matrix product, measured now, and that of exponentials at this clock.

    A measured rate takes the device's power limit into account, which a data sheet does not. On a
    CPU both rates are measured, on the threads that torch uses.
    """
    if device.type == "cpu":
        return _cpu_rates(dtype)
    size = 8192
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(left, right)
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return Rates(2 * size**3 / best, EXPONENTIALS_PER_CLOCK * multiprocessors * clock)


def _cpu_rates(dtype: torch.dtype) -> Rates:
    size = 512
    left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    out = torch.empty_like(left)
    products, exponentials = float("inf"), float("inf")
    for _ in range(5):
        start = time.process_time()
        torch.mm(left, right, out=out)
        middle = time.process_time()
        torch.exp(left, out=out)
        products = min(products, middle - start)
        exponentials = min(exponentials, time.process_time() - middle)
    return Rates(2 * size**3 / products, size**2 / exponentials)
