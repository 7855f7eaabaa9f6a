"""Predictive entropy over a vocabulary of 151,936 against a compiled, fused peer."""

import torch
from step import Parts, Run
from torch import Tensor


def parts(run: Run) -> Parts:
    """Seconds and peak bytes, by type."""
    dtypes = (torch.float32,) if run.toy else (torch.bfloat16, torch.float32)
    return {str(dtype): lambda dtype=dtype: times(run, dtype) for dtype in dtypes}


def peer(logits: Tensor) -> Tensor:
    """What a compiler fuses: difference of the log-sum-exp and the mean logit."""
    logits = logits.float()
    lse = logits.logsumexp(-1)
    return lse - ((logits - lse[..., None]).exp() * logits).sum(-1)


def times(run: Run, dtype: torch.dtype) -> dict[str, dict[str, float | None]]:
    """Ours and the peer's, found to agree first."""
    from layer import Layer
    from timing import peak_bytes, quantiles, seconds

    from tokenweights import predictive_entropy

    tokens, vocabulary = (4, 512) if run.toy else (4096, 151936)
    layer = Layer(tokens, 1, 1, 1, dtype, run.device)
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, tokens, vocabulary, device=run.device).to(dtype)
    fused = peer if run.toy else torch.compile(peer)
    torch.testing.assert_close(predictive_entropy(logits), fused(logits), atol=1e-3, rtol=1e-3)
    found = {}
    for name, function in (("ours", predictive_entropy), ("compiled peer", fused)):
        spent = seconds(lambda f=function: f(logits), layer, 0.0 if run.toy else 2.0)
        peak = peak_bytes(lambda f=function: f(logits), layer)
        found[name] = {"p50": quantiles(spent)[1], "peak_bytes": peak}
    return found
