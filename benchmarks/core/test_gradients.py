"""Projection ratios of ten deciles from one derivative, against a backward pass for each of them.

The backward passes share one forward pass, as `group_gradients` runs them: the full gradient and
ten groups, eleven in all. Memory is the peak beside the model, against the parameters and what one
training step's forward pass keeps for its backward pass.
"""

import os
import statistics
import subprocess
import sys
import time

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import tokenweights as tw

ROWS, PROMPT, RESPONSE, PAIRS = 2, 64, 448, 3

# Memory is read in a process of its own, from Linux's high-water mark of resident memory.
MEMORY = """
import sys
sys.path.insert(0, {folder!r})
import torch
import tokenweights as tw
from test_gradients import deciles, losses, policy

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

def peak(function):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before

torch.set_num_threads(1)
model = policy()
loss, mask = losses(model)
groups = deciles(mask)
loss()[mask].mean().backward()  # the first step loads code and fills allocator caches
model.zero_grad(set_to_none=True)
activations = peak(loss)
parameters = sum(p.nbytes for p in model.parameters())
probe = tw.GradientProbe(model)
alignment = peak(lambda: tw.token_alignment(loss, model, mask=mask))
geometry = peak(lambda: probe.geometry(loss, groups, mask=mask, count=10))
print(parameters, activations, alignment, geometry)
"""


def policy() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=PROMPT + RESPONSE,
        )
    )


def losses(model: Qwen3ForCausalLM):
    """A callable that computes on-policy losses of one batch, and its mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(512, (ROWS, PROMPT + RESPONSE), generator=generator)
    mask = torch.arange(RESPONSE) < torch.tensor([[RESPONSE], [RESPONSE // 2]])
    advantages = torch.tensor([[1.0], [-0.5]])

    def log_probs() -> torch.Tensor:
        logits = model(ids, use_cache=False).logits[:, PROMPT - 1 : -1]
        return logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None])[..., 0]

    with torch.no_grad():
        old = log_probs()

    def loss() -> torch.Tensor:
        return tw.clipped_surrogate_loss(log_probs(), old, advantages, mask=mask)

    return loss, mask


def deciles(mask: torch.Tensor) -> torch.Tensor:
    scores = torch.rand(mask.shape, generator=torch.Generator().manual_seed(2))
    return tw.quantile_bins(scores, mask, bins=10)


def by_alignment(model, loss, mask, groups, method, tolerance):
    found = tw.token_alignment(loss, model, mask=mask, method=method, tolerance=tolerance)
    return tw.group_projection_ratios(found.projection_ratio, groups, mask, count=10)


def by_backward_passes(model, loss, mask, groups):
    gradients = tw.group_gradients(loss(), groups, model.parameters(), mask=mask)
    ratios = [tw.gradient_geometry(g, gradients.total).projection_ratio for g in gradients.groups]
    return torch.tensor(ratios, dtype=torch.float64)


def seconds(function, *arguments):
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


@pytest.mark.parametrize(
    ("method", "attention", "tolerance"),
    [
        ("differences", "sdpa", 1e-4),  # the default: two forward passes are enough
        ("differences", "sdpa", 1e-5),  # two more are needed
        ("differences", "eager", 1e-5),
        ("forward", "eager", 1e-4),
        ("auto", "eager", 1e-5),  # takes the forward mode: as cheap as four passes
    ],
)
def test_decile_projection_ratios(benchmark, method, attention, tolerance):
    model = policy()
    model.set_attn_implementation(attention)
    loss, mask = losses(model)
    setting = (model, loss, mask, deciles(mask))
    choices = (method, tolerance)
    one, other = by_alignment(*setting, *choices), by_backward_passes(*setting)
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)

    # Pairs, so that a slow spell of the machine hits both sides.
    pairs = [
        (seconds(by_backward_passes, *setting), seconds(by_alignment, *setting, *choices))
        for _ in range(PAIRS)
    ]
    ratio = statistics.median(passes / aligned for passes, aligned in pairs)
    benchmark.extra_info["eleven backward passes / token_alignment (median)"] = round(ratio, 3)
    error = float((one - other).abs().max())
    print(
        f"\n{method}, tolerance {tolerance:.0e}: eleven backward passes / token_alignment "
        f"{ratio:.2f}, ratios apart by {error:.1e} at most"
    )
    benchmark.pedantic(by_alignment, args=(*setting, *choices), rounds=1)


def test_probe_memory(benchmark):
    code = MEMORY.format(folder=__file__.rpartition("/")[0])
    # Large tensors in pages of their own, which go back when freed: resident memory is live memory.
    pages = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=pages
    )
    parameters, activations, alignment, geometry = map(int, shown.stdout.split())
    budget = parameters + activations
    benchmark.extra_info["token_alignment / (parameters + activations)"] = alignment / budget
    benchmark.extra_info["GradientProbe / (parameters + activations)"] = geometry / budget
    print(
        f"\nparameters {parameters / 2**20:.0f} MiB, activations {activations / 2**20:.0f} MiB; "
        f"peak beside the model: token_alignment {alignment / budget:.3f}, "
        f"GradientProbe {geometry / budget:.3f} of their sum"
    )
    benchmark.pedantic(lambda: None, rounds=1)
