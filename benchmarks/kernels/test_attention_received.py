"""Attention received on one CPU thread, against the entropy and against materialised weights.

Times are CPU time of this process, functions taking turns; peak memory is the growth of the
resident set in a fresh process, as in `test_attention_entropy.py`.
"""

import subprocess
import sys

import pytest
import torch
from test_attention_entropy import inputs, report, seconds

from tokenweights import Received, attention_entropy, attention_received, attention_statistics

TOKENS, HORIZON = 4096, (10, 50)


def eager_received(query, key):
    """What each key gets on average, from the whole attention matrix of every head."""
    tokens = query.shape[2]
    mask = torch.full((tokens, tokens), -torch.inf).triu(1)
    weights = torch.softmax(query @ key.transpose(2, 3) * query.shape[3] ** -0.5 + mask, dim=-1)
    return weights.mean(1).sum(1) / torch.arange(tokens, 0, -1)


def peak_bytes(function):
    """Growth of the resident set while `function` runs once, in a fresh process."""
    code = f"""
import sys, torch
sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
from test_attention_received import TOKENS, attention_received, eager_received, inputs
def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024
torch.set_num_threads(1)
query, key = inputs(TOKENS)
{function}(query[:, :, :64], key[:, :, :64])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
{function}(query, key)
print(status("VmHWM") - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")
def test_columns_beside_the_entropy(benchmark):
    query, key = inputs(TOKENS)
    expected = eager_received(query, key)
    torch.testing.assert_close(attention_received(query, key), expected, atol=1e-5, rtol=0)

    def both(received):
        attention_statistics(query, key, kinds=("normalized",), received=received)

    entropy, received, horizon, together, whole = seconds(
        [
            lambda: attention_entropy(query, key),
            lambda: attention_received(query, key),
            lambda: attention_received(query, key, horizon=HORIZON),
            lambda: both(Received()),
            lambda: attention_statistics(
                query,
                key,
                kinds=("normalized", "mean_distance"),
                distance_bound=10,
                received=Received(HORIZON),
            ),
        ],
        rounds=5,
    )
    benchmark.pedantic(attention_received, (query, key), rounds=3)
    small, large = (peak_bytes(f) for f in ("attention_received", "eager_received"))
    record = {
        "entropy_ms": 1e3 * entropy,
        "received": received / entropy,
        "with a horizon": horizon / entropy,
        "both": together / max(entropy, received),
        "both and a bounded distance": whole / max(entropy, received),
        "received_MiB": small / 2**20,
        "memory_ratio": large / small,
    }
    report(benchmark, f"T={TOKENS}", record)
