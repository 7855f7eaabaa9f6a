"""Seconds and bytes of single calls."""

import os
import statistics
import time
from collections.abc import Callable

import torch
from layer import Layer


def seconds(function: Callable[[], object], layer: Layer, budget: float) -> list[float]:
    """Times of single calls: GPU events with a cold L2 cache, or CPU time of this process.

    Args:
        function: Called once before the clock starts.
        layer: Where it runs.
        budget: Seconds to spend, five calls at least; 0 for a single call.
    """
    function()
    spent: list[float] = []
    gpu = layer.device.type == "cuda"
    flushed = torch.empty(2**28, dtype=torch.int8, device=layer.device) if gpu else None
    begin = time.perf_counter()
    while len(spent) < (5 if budget else 1) or (
        time.perf_counter() - begin < budget and len(spent) < 200
    ):
        if flushed is None:
            start = time.process_time()
            function()
            spent.append(time.process_time() - start)
            continue
        flushed.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        function()
        events[1].record()
        torch.cuda.synchronize()
        spent.append(events[0].elapsed_time(events[1]) / 1e3)
    return spent


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(times) == 1:
        return (times[0],) * 3
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]


def peak_bytes(function: Callable[[], object], layer: Layer) -> int | None:
    """Memory beyond what was allocated before; on a CPU see test_attention_entropy.py."""
    if layer.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free_bytes(layer: Layer) -> float:
    """Memory that a contender may take."""
    if layer.device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
