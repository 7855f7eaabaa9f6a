"""Attention entropy on one CPU thread, against materialised weights and against its floor.

Times are CPU time of this process, the best of a few rounds. Peak memory is the growth of the
resident set during one call in a fresh process, by the high-water mark that Linux keeps; it
includes what the allocator and the matrix library take. Numbers are printed only after the
results have been found equal.
"""

import subprocess
import sys
import time

import pytest
import torch

from tokenweights import attention_entropy
from tokenweights.attention import attention_entropy_varlen

HEADS, DIM, ROWS = 16, 64, 128


def inputs(tokens, heads=HEADS, kv_heads=HEADS, dim=DIM, batch=1):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, tokens, dim, generator=generator)
    key = torch.randn(batch, kv_heads, tokens, dim, generator=generator)
    return query, key


def eager_entropy(query, key):
    """Normalised entropy from the whole attention matrix, as eager attention leaves it."""
    tokens = query.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    mask = torch.full((tokens, tokens), -torch.inf).triu(1)
    weights = torch.softmax(query @ key.transpose(2, 3) * query.shape[3] ** -0.5 + mask, dim=-1)
    count = torch.arange(1, tokens + 1)
    entropy = torch.special.entr(weights.mean(1)).sum(-1)
    return entropy / count.log().where(count > 1, 1.0)


def block_entropy(query, key, first):
    """Normalised entropy of some rows of one sequence: what a user would write first."""
    position = first + torch.arange(query.shape[1])
    hidden = torch.arange(key.shape[1]) > position[:, None]
    scores = (query @ key.transpose(1, 2) * query.shape[2] ** -0.5).masked_fill(hidden, -torch.inf)
    entropy = torch.special.entr(torch.softmax(scores, -1).mean(0)).sum(-1)
    return entropy / (position + 1).log().where(position > 0, 1.0)


def entropy_by_blocks(query, key, block_entropy):
    """One block of rows after another, each with the keys it sees."""
    tokens = query.shape[2]
    blocks = [
        block_entropy(query[0, :, start : start + ROWS], key[0, :, : start + ROWS], start)
        for start in range(0, tokens, ROWS)
    ]
    return torch.cat(blocks)[None]


def floor(query, key):
    """The passes no implementation avoids: the products, one softmax, one logarithm of the mean."""
    heads, tokens = query.shape[1], query.shape[2]
    scores, weights = torch.empty(ROWS * tokens), torch.empty(ROWS * tokens)
    logarithm = torch.empty(ROWS * tokens)
    for start in range(0, tokens, ROWS):
        stop = min(start + ROWS, tokens)
        size, shape = (stop - start) * stop, (1, stop - start, stop)
        tile, softmax = scores[:size].view(shape), weights[:size].view(shape)
        for head in range(heads):
            rows, columns = query[0, head : head + 1, start:stop], key[0, head : head + 1, :stop]
            torch.bmm(rows, columns.transpose(1, 2), out=tile)
            torch.softmax(tile, dim=-1, out=softmax)
        torch.log(softmax, out=logarithm[:size].view(shape))


def seconds(functions, rounds):
    """Least CPU seconds of each function, the functions taking turns."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for index, function in enumerate(functions):
            start = time.process_time()
            function()
            best[index] = min(best[index], time.process_time() - start)
    return best


def peak_bytes(function, tokens):
    """Growth of the resident set while `function` runs once, in a fresh process."""
    code = f"""
import sys, torch
sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
from test_attention_entropy import attention_entropy, eager_entropy, inputs
def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024
torch.set_num_threads(1)
query, key = inputs({tokens})
{function}(query[:, :, :64], key[:, :, :64])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
{function}(query, key)
print(status("VmHWM") - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_chunked_against_materialised_weights(benchmark, tokens):
    query, key = inputs(tokens)
    expected = eager_entropy(query, key)
    torch.testing.assert_close(attention_entropy(query, key), expected, atol=1e-5, rtol=0)
    chunked, eager = seconds(
        [lambda: attention_entropy(query, key), lambda: eager_entropy(query, key)], rounds=3
    )
    benchmark.pedantic(attention_entropy, (query, key), rounds=3)
    record = {"chunked_ms": 1e3 * chunked, "eager_ms": 1e3 * eager, "speedup": eager / chunked}
    if sys.platform == "linux":
        small, large = (peak_bytes(f, tokens) for f in ("attention_entropy", "eager_entropy"))
        record |= {"chunked_MiB": small / 2**20, "eager_MiB": large / 2**20}
        record["memory_ratio"] = large / small
    report(benchmark, f"T={tokens}", record)


# torch's compiler imports a part of torch that torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("tokens", [1024, 2048, 4096])
def test_chunked_against_compiled_row_blocks(benchmark, tokens):
    query, key = inputs(tokens)
    compiled_block = torch.compile(block_entropy, dynamic=True)

    def compiled_entropy(query, key):
        return entropy_by_blocks(query, key, compiled_block)

    expected = compiled_entropy(query, key)
    torch.testing.assert_close(attention_entropy(query, key), expected, atol=1e-5, rtol=0)
    chunked, compiled = seconds(
        [lambda: attention_entropy(query, key), lambda: compiled_entropy(query, key)], rounds=5
    )
    benchmark.pedantic(attention_entropy, (query, key), rounds=3)
    record = {"chunked_ms": 1e3 * chunked, "compiled_ms": 1e3 * compiled}
    report(benchmark, f"T={tokens}", record | {"ratio": compiled / chunked})


@pytest.mark.parametrize(("sequences", "tokens"), [(2048, 16), (512, 64), (128, 256)])
def test_short_packed_sequences_against_one_dense_call(benchmark, sequences, tokens):
    query, key = inputs(tokens, batch=sequences)
    rows = [part.transpose(1, 2).flatten(0, 1).contiguous() for part in (query, key)]
    bounds = torch.arange(sequences + 1) * tokens

    def packed():
        return attention_entropy_varlen(*rows, cu_seqlens_q=bounds, cu_seqlens_k=bounds)

    expected = eager_entropy(query, key)
    torch.testing.assert_close(packed(), expected.flatten(), atol=1e-5, rtol=0)
    spent, dense, eager = seconds(
        [packed, lambda: attention_entropy(query, key), lambda: eager_entropy(query, key)], rounds=5
    )
    benchmark.pedantic(packed, rounds=3)
    record = {"packed_ms": 1e3 * spent, "dense_ms": 1e3 * dense, "eager_ms": 1e3 * eager}
    record |= {"packed/dense": spent / dense, "packed/eager": spent / eager}
    report(benchmark, f"{sequences} x {tokens}", record)


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_chunked_against_its_floor(benchmark, tokens):
    query, key = inputs(tokens)
    chunked, least = seconds(
        [lambda: attention_entropy(query, key), lambda: floor(query, key)], rounds=5
    )
    benchmark.pedantic(attention_entropy, (query, key), rounds=3)
    record = {"chunked_ms": 1e3 * chunked, "floor_ms": 1e3 * least, "ratio": chunked / least}
    report(benchmark, f"T={tokens}", record)


@pytest.mark.parametrize("spread", [1, 20])
def test_peaked_attention_costs_no_more(benchmark, spread):
    query, key = inputs(2048)
    query *= spread
    (spent,) = seconds([lambda: attention_entropy(query, key)], rounds=3)
    benchmark.pedantic(attention_entropy, (query, key), rounds=3)
    report(benchmark, f"T=2048, scores x{spread}", {"chunked_ms": 1e3 * spent})


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dim", [32, 64])
def test_share_of_a_training_step(benchmark, batch, dim):
    """One probed layer against forward and backward of an eight-layer model with 8 heads."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=8 * dim,
        intermediate_size=24 * dim,
        num_hidden_layers=8,
        num_attention_heads=8,
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(512, (batch, 1024), generator=torch.Generator().manual_seed(0))
    query, key = inputs(1024, 8, 8, dim, batch)

    def step():
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    probe, training = seconds([lambda: attention_entropy(query, key), step], rounds=3)
    benchmark.pedantic(attention_entropy, (query, key), rounds=3)
    record = {"probe_ms": 1e3 * probe, "step_ms": 1e3 * training, "percent": 100 * probe / training}
    report(benchmark, f"batch={batch}, dim={dim}", record)


def report(benchmark, title, record):
    benchmark.extra_info.update(record)
    print(f"\n{title}: " + ", ".join(f"{name} {value:.2f}" for name, value in record.items()))
