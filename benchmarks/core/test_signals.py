"""Predictive entropy at a vocabulary of 151,936, against the entropies that trainers compute.

TRL's is its own function, imported; VeRL's two are its formulas, written anew. Memory is read in a
process of its own, from Linux's high-water mark of resident memory.
"""

import subprocess
import sys
import time

import pytest
import torch

import tokenweights as tw

VOCABULARY = 151_936
TOKENS = 256

MEMORY = """
import torch
import test_signals

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

torch.set_num_threads(1)
contender = test_signals.CONTENDERS[{name!r}]
logits = test_signals.logits(torch.{dtype}, sliced={sliced})
contender(test_signals.logits(torch.{dtype}, sliced=False)[:, :1, :999])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
contender(logits)
print(status("VmHWM") - before)
"""


def logits(dtype, *, sliced):
    """The response of longer rows, as a slice of them or on its own."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.empty(2, TOKENS // 2 + 8, VOCABULARY, dtype=dtype)
    for row in whole:
        row.copy_(torch.randn(row.shape, generator=generator) * 3)
    response = whole[:, 8:]
    return response if sliced else response.contiguous()


def trl(logits):
    from trl.trainer.utils import entropy_from_logits

    return entropy_from_logits(logits)


def verl(logits):
    """`entropy_from_logits` of VeRL."""
    probs = torch.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - torch.sum(probs * logits, dim=-1)


def verl_chunked(logits, chunk_size=2048):
    """`entropy_from_logits_with_chunking` of VeRL."""
    rows = logits.reshape(-1, logits.shape[-1])
    parts = [verl(chunk.float()) for chunk in rows.split(chunk_size)]
    return torch.cat(parts).view(logits.shape[:-1])


CONTENDERS = {
    "tokenweights": tw.predictive_entropy,
    "TRL": trl,
    "VeRL": verl,
    "VeRL, chunked": verl_chunked,
}


def exact(logits):
    rows = [row.double().log_softmax(-1) for row in logits.flatten(0, 1)]
    return torch.stack([-(row.exp() * row).sum() for row in rows]).view(logits.shape[:-1])


def seconds(function, *arguments):
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def extra_memory(name, dtype, sliced):
    """MiB that a call takes beside its input."""
    code = MEMORY.format(name=name, dtype=str(dtype).removeprefix("torch."), sliced=sliced)
    command = [sys.executable, "-W", "ignore", "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=FOLDER)
    return int(shown.stdout.split()[-1]) / 1024


FOLDER = __file__.rpartition("/")[0]


@pytest.mark.parametrize("sliced", [False, True], ids=["contiguous", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_predictive_entropy(benchmark, dtype, sliced):
    given = logits(dtype, sliced=sliced)
    expected = exact(given)
    torch.testing.assert_close(tw.predictive_entropy(given).double(), expected, rtol=0, atol=5e-6)
    own = [seconds(tw.predictive_entropy, given) for _ in range(3)]
    print()
    for name, contender in CONTENDERS.items():
        # Each takes its turns beside ours, so that other work on the machine meets both.
        pairs = [(seconds(contender, given), seconds(tw.predictive_entropy, given)) for _ in own]
        ratio = sorted(peer / ours for peer, ours in pairs)[1]
        error = (contender(given).double() - expected).abs().max().item()
        memory = extra_memory(name, dtype, sliced)
        benchmark.extra_info[name] = [round(ratio, 2), round(memory, 1), error]
        print(f"{name}: time {ratio:.2f} x ours, {memory:.1f} MiB, off by {error:.1e} nats")
    benchmark.pedantic(tw.predictive_entropy, args=(given,), rounds=1)
