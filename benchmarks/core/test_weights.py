"""Weights and aggregation of a large rollout batch, against one sort of its scores.

Sorting is what a partition costs, and the yardstick any within-response rule has to bear.
"""

import subprocess
import sys
import time

import torch

import tokenweights as tw

ROWS, TOKENS = 4096, 8192

# Extra memory is read in a process of its own, from Linux's high-water mark of resident memory.
MEMORY = """
import torch
import tokenweights as tw

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

torch.set_num_threads(1)
scores, loss = torch.rand({rows}, {tokens}), torch.rand({rows}, {tokens})
mask = torch.ones({rows}, {tokens}, dtype=torch.bool)
mask[:, ::10] = False
tw.endpoint_weights(scores[:2], mask[:2], tw.Endpoints(1.0, 0.0))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
weights = tw.endpoint_weights(scores, mask, tw.Endpoints(1.0, 0.0))
tw.weighted_token_mean(loss, mask, weights)
print(status("VmHWM") - before)
"""


def batch():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(ROWS, TOKENS, generator=generator)
    mask = torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (ROWS, 1), generator=generator)
    return scores, torch.rand(ROWS, TOKENS, generator=generator), mask


def weighted(scores, token_loss, mask):
    weights = tw.endpoint_weights(scores, mask, tw.Endpoints(1.0, 0.0))
    return tw.weighted_token_mean(token_loss, mask, weights)


def seconds(function, *arguments):
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def test_weights_and_aggregation(benchmark):
    scores, token_loss, mask = batch()
    valid = scores[:64][mask[:64]].double()
    low, high = valid.min(), valid.max()
    exact = 1 - ((valid - low).exp() - 1) / ((high - low).exp() - 1)
    expected = (exact * token_loss[:64][mask[:64]]).sum() / len(valid)
    got = weighted(scores[:64], token_loss[:64], mask[:64])
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)

    pairs = [
        (seconds(torch.sort, scores), seconds(weighted, scores, token_loss, mask)) for _ in range(3)
    ]
    ratio = sorted(own / sort for sort, own in pairs)[1]
    code = MEMORY.format(rows=ROWS, tokens=TOKENS)
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    memory = int(shown.stdout) * 1024 / scores.nbytes
    benchmark.extra_info["time / torch.sort (median)"] = round(ratio, 3)
    benchmark.extra_info["peak extra memory / scores"] = round(memory, 3)
    print(f"\ntime {ratio:.2f} x torch.sort, peak extra memory {memory:.2f} x the scores")
    benchmark.pedantic(weighted, args=(scores, token_loss, mask), rounds=1)
