"""What the attention probe adds to a forward pass of a deep model."""

import statistics
import time

import torch
from capture import model
from step import Parts, Run


def parts(run: Run) -> Parts:
    """Seconds of a forward pass with and without, for as many of 36 layers as fit."""
    return {"forward": lambda: overhead(run)}


def overhead(run: Run) -> dict[str, float]:
    """Medians of pairs, so that a slow spell hits both sides."""
    import tokenweights as tw

    layers, tokens, pairs = (2, 24, 1) if run.toy else (36, 8192, 7)
    if run.device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
        layers = min(layers, int(0.6 * free / 400e6))  # bytes of a layer and what it works with
    policy = model(run, layers)
    ids = torch.randint(0, 512, (1, tokens), device=run.device)
    mask, layer = torch.ones_like(ids, dtype=torch.bool), tw.middle_layer(layers)

    def seconds(*, probed: bool) -> float:
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            if probed:
                with tw.capture_attention(policy, [layer]) as capture:
                    policy(ids, use_cache=False)
                capture.calls[layer][0].entropy(key_mask=mask)
            else:
                policy(ids, use_cache=False)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(probed=True), seconds(probed=False)
    times = [(seconds(probed=False), seconds(probed=True)) for _ in range(pairs)]
    return {
        "layers": layers,
        "tokens": tokens,
        "plain": statistics.median(plain for plain, _ in times),
        "ratio": statistics.median(probed / plain for plain, probed in times),
    }
