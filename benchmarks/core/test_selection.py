"""The highest fifth of ten million scores, against one sort of them.

Memory is read in a process of its own, from Linux's high-water mark of resident memory.
"""

import subprocess
import sys
import time

import pytest
import torch

import tokenweights as tw

ROWS, TOKENS = 1000, 10_000
FRACTION = 0.2

MEMORY = """
import torch
import test_selection

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

torch.set_num_threads(1)
contender = test_selection.CONTENDERS[{name!r}]
scores, mask = test_selection.batch()
contender(scores[:2, :9], mask[:2, :9])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
kept = contender(scores, mask)
print(status("VmHWM") - before)
"""


def batch():
    scores = torch.rand(ROWS, TOKENS, generator=torch.Generator().manual_seed(0))
    return scores, torch.ones_like(scores, dtype=torch.bool)


def selected(scores, mask):
    return tw.select(scores, mask, fraction=FRACTION, scope="batch")


def by_response(scores, mask):
    return tw.select(scores, mask, fraction=FRACTION)


def within(scores, mask):
    return tw.select_within(scores, mask, mean=0.04, scope="batch")


def median(scores, mask):
    return tw.score_quantile(scores, mask, fraction=0.5, scope="batch")


def one_sort(scores, mask):
    return torch.sort(scores.flatten())


CONTENDERS = {
    "select, batch": selected,
    "select, response": by_response,
    "select_within, batch": within,
    "score_quantile, batch": median,
    "torch.sort": one_sort,
}


def by_sort(scores):
    """The same tokens by a stable sort of them all."""
    order = scores.flatten().argsort(stable=True)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[order[-round(FRACTION * len(order)) :]] = True
    return chosen.view(scores.shape)


def seconds(function, *arguments):
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def extra_memory(name):
    """MiB that a call takes beside its input, the result included."""
    command = [sys.executable, "-W", "ignore", "-c", MEMORY.format(name=name)]
    folder = __file__.rpartition("/")[0]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return int(shown.stdout.split()[-1]) / 1024


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != "torch.sort"])
def test_selection(benchmark, name):
    scores, mask = batch()
    assert torch.equal(selected(scores, mask), by_sort(scores))
    # Each takes its turns beside a sort, so that other work on the machine meets both.
    function = CONTENDERS[name]
    pairs = [(seconds(function, scores, mask), seconds(one_sort, scores, mask)) for _ in range(3)]
    ratio = sorted(own / sort for own, sort in pairs)[1]
    memory = {each: round(extra_memory(each), 1) for each in (name, "torch.sort")}
    benchmark.extra_info[name] = [round(ratio, 2), memory]
    print(f"\n{name}: time {ratio:.2f} x one sort, MiB {memory}")
    benchmark.pedantic(function, args=(scores, mask), rounds=1)
