"""Token alignment and the gradient probe in the type of training."""

import time

import torch
from capture import model
from step import Parts, Run


def parts(run: Run) -> Parts:
    """Units of a forward and backward pass, and how far projection ratios are from one in sum."""
    return {"alignment": lambda: alignment(run), "probe": lambda: probe(run)}


def losses(run: Run) -> tuple:
    """A model of two layers, and the unreduced losses of two rows."""
    policy, tokens = model(run, 2), 12 if run.toy else 512
    ids = torch.randint(0, 512, (2, tokens), device=run.device)

    def token_loss() -> torch.Tensor:
        logits = policy(ids, use_cache=False).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], reduction="none"
        )

    return policy, token_loss, torch.ones_like(ids[:, 1:], dtype=torch.bool)


def seconds(run: Run, function) -> tuple[float, object]:
    """Of the second of two calls, and what it returned."""
    for _ in range(2):
        start = time.perf_counter()
        found = function()
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        spent = time.perf_counter() - start
    return spent, found


def alignment(run: Run) -> dict[str, float]:
    """Projection ratios of tokens sum to one, after and (coarsely) before they are scaled."""
    import tokenweights as tw

    policy, token_loss, mask = losses(run)
    plain, _ = seconds(run, lambda: token_loss().mean().backward())
    policy.zero_grad(set_to_none=True)
    # Differences of bfloat16 losses hold few digits; how many is what this step finds.
    tolerance = 1e-3 if run.toy else 0.5
    spent, found = seconds(
        run, lambda: tw.token_alignment(token_loss, policy, mask=mask, tolerance=tolerance)
    )
    total = float(found.projection_ratio.sum())
    assert abs(total - 1) <= 1e-6 and found.sum_error <= tolerance, (total, found.sum_error)
    return {"passes": spent / plain, "plain": plain, "sum error": found.sum_error}


def probe(run: Run) -> dict[str, float]:
    """Projection ratios of two groups sum to one."""
    import tokenweights as tw

    policy, token_loss, mask = losses(run)
    plain, _ = seconds(run, lambda: token_loss().mean().backward())
    policy.zero_grad(set_to_none=True)
    groups = (torch.arange(mask.shape[1], device=run.device) % 2).expand(mask.shape)
    spent, found = seconds(
        run, lambda: tw.GradientProbe(policy).geometry(token_loss, groups, mask=mask, count=2)
    )
    total = sum(group.projection_ratio for group in found.groups)
    assert abs(total - 1) <= (1e-3 if run.toy else 5e-2), total
    return {"passes": spent / plain, "plain": plain, "sum of the ratios": float(total)}
