"""What is looked at along a training: gradients, entropies, layers, roles.

Subsets are those of the task's probe layer, and those that the masks train: anchors are the lowest
fifth of each response by attention entropy, explorers the highest one.
"""

from typing import Any

import torch
from tokenweights_lab import load_policy
from torch import Tensor

import tokenweights as tw
from paper.arms import ARMS, UNTRAINED, Arm
from paper.engine import fast
from paper.training import (
    Settings,
    Step,
    Weigher,
    role_masks,
    rolled_out,
    task_of,
    train,
)
from paper.warm_start import warm_started

TENTHS = 10


def token_losses(policy: Any, step: Step) -> Tensor:
    """Unreduced losses with a graph, `batch token`."""
    log_probs = fast.response_log_probs(policy, step.rollout)
    advantages = step.advantages.expand(log_probs.shape)
    return tw.clipped_surrogate_loss(log_probs, log_probs.detach(), advantages)


def geometry(
    subset: tuple[Tensor, ...], full: tuple[Tensor, ...], share: float
) -> dict[str, float]:
    """Cosine, projection under the all-token mean, norm ratio under the selected-token mean."""
    found = tw.gradient_geometry(subset, full)
    values = {"cosine": found.cosine, "projection": found.projection_ratio}
    return rounded({**values, "norm": found.norm_ratio / share if share else 0.0})


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Four digits; None where there is no number, as JSON has it."""
    return {name: None if v != v else round(v, 4) for name, v in values.items()}


def subsets(scores: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Anchors and explorers."""
    return {
        "anchor": tw.bottom_fraction(scores, mask, fraction=0.2),
        "explorer": tw.top_fraction(scores, mask, fraction=0.2),
    }


def gradients(policy: Any, step: Step, scores: Tensor) -> dict[str, Any]:
    """Geometry of random tokens, anchors and explorers, and the projection of every tenth."""
    mask, losses = step.rollout.mask, token_losses(policy, step)
    tenths = tw.quantile_bins(scores, mask, bins=TENTHS)
    groups = tw.group_gradients(losses, tenths, policy.parameters, mask=mask)
    chosen = subsets(scores, mask)
    chosen["random"] = tw.random_fraction(mask, fraction=0.2, seed=step.number)
    count = mask.sum().item()
    found: dict[str, Any] = {}
    for name, held in chosen.items():
        own = tw.group_gradients(losses, torch.where(held, 0, -1), policy.parameters, mask=mask)
        found[name] = geometry(own.groups[0], groups.total, held.sum().item() / count)
    projections = [tw.gradient_geometry(part, groups.total) for part in groups.groups]
    found["tenths"] = [round(each.projection_ratio, 4) for each in projections]
    shares = [(tenths == part).sum().item() / count for part in range(TENTHS)]
    found["tenth_shares"] = [round(share, 4) for share in shares]
    return found


def entropies(step: Step, probe: int) -> dict[str, Any]:
    """Dynamics by group, relation to the predictive entropy, and agreement of the layers."""
    mask, scores = step.rollout.mask, step.rollout.attention[probe]
    dynamics = tw.group_dynamics(scores, [*subsets(scores, mask).values(), mask])
    predictive = step.rollout.predictive_entropy
    layers = torch.stack([step.rollout.attention[n] for n in sorted(step.rollout.attention)])
    agreement = tw.layer_agreement(layers, mask)
    apart = ~torch.eye(len(layers), dtype=torch.bool)
    return {
        "mean": [round(v, 4) for v in dynamics.mean.tolist()],
        "deviation": [round(v, 4) for v in dynamics.std.tolist()],
        "predictive": round(predictive[mask].mean().item(), 4),
        "correlation": round(float(tw.pearson_correlation(scores, predictive, mask)), 4),
        "layers": rounded(
            {
                "anchors": agreement.anchor_jaccard[apart].mean().item(),
                "explorers": agreement.explorer_jaccard[apart].mean().item(),
                "ranks": agreement.rank_correlation[apart].mean().item(),
            }
        ),
    }


QUADRANTS = ("certain, concentrated", "uncertain, concentrated", "certain, diffuse",
             "uncertain, diffuse")  # fmt: skip


def quadrants(step: Step, task: Any, probe: int) -> dict[str, dict[str, float]]:
    """Shares of the roles in each quadrant of predictive and attention entropy (Eq. 22)."""
    mask = step.rollout.mask
    found = tw.median_quadrants(
        step.rollout.predictive_entropy, step.rollout.attention[probe], mask
    )
    roles = role_masks(task, step.texts, mask)
    return {
        name: rounded(
            {role: ((found == place) & held).sum().item() / max(1, (found == place).sum().item())
             for role, held in roles.items()}
        )
        for place, name in enumerate(QUADRANTS)
    }  # fmt: skip


def support(policy: Any, step: Step, probe: int) -> dict[str, list[float]]:
    """Keys that hold half and nine tenths of the attention of anchors, explorers and all tokens."""
    shares, mask = attention_shares(policy, step, probe), step.rollout.mask
    groups = [*subsets(step.rollout.attention[probe], mask).values(), mask]
    reached = shares.sort(-1, descending=True).values.cumsum(-1)
    found = {}
    for mass in (0.5, 0.9):
        needed = (reached < mass).sum(-1).double() + 1
        found[str(mass)] = [round(needed[group].mean().item(), 2) for group in groups]
    return found


def attention_shares(policy: Any, step: Step, probe: int) -> Tensor:
    """Head-averaged attention of the row that decides each response token, `batch token key`."""
    model = load_policy(attn_implementation="eager")
    fast.write_policy(policy, model)
    rollout = step.rollout
    ids, real = rollout.sequences
    with torch.no_grad():
        output = model(ids, attention_mask=real.long(), output_attentions=True, use_cache=False)
    start = rollout.prompts.shape[1] - 1
    return output.attentions[probe].mean(1)[:, start : start + rollout.tokens.shape[1]]


class Watch:
    """Collects probes at five points of a training."""

    def __init__(self, warm_start: str, settings: Settings):
        self.task = task_of(warm_start)
        self.at = sorted({round(settings.steps * part / 4) for part in range(5)})
        self.found: list[dict[str, Any]] = []

    def __call__(self, policy: Any, step: Step) -> None:
        if step.number not in self.at:
            return
        scores = step.rollout.attention[self.task.probe]
        found: dict[str, Any] = {"step": step.number, "entropies": entropies(step, self.task.probe)}
        found["roles"] = roles_of(step, self.task, scores)
        found["quadrants"] = quadrants(step, self.task, self.task.probe)
        found["support"] = support(policy, step, self.task.probe)
        if (step.advantages != 0).any():
            found["gradients"] = gradients(policy, step, scores)
        self.found.append(found)


def roles_of(step: Step, task: Any, scores: Tensor) -> dict[str, dict[str, float]]:
    """By role: share of the tokens, of anchors, of explorers, and of the predictive entropy."""
    mask = step.rollout.mask
    low, high = subsets(scores, mask).values()
    predictive = torch.where(mask, step.rollout.predictive_entropy, 0.0)
    found = {}
    for role, held in role_masks(task, step.texts, mask).items():
        found[role] = rounded(
            {
                "tokens": (held.sum() / mask.sum()).item(),
                "anchors": ((low & held).sum() / low.sum()).item(),
                "explorers": ((high & held).sum() / high.sum()).item(),
                "entropy": (predictive[held].sum() / predictive.sum()).item(),
            }
        )
    return found


def probed(warm_start: str, arm: Arm, seed: int, settings: Settings) -> dict[str, Any]:
    """A training with probes along it."""
    watch = Watch(warm_start, settings)
    measured = train(warm_start, arm, seed, settings, watch=watch)
    return {**measured, "probes": watch.found}


def first_gradients(warm_start: str, seed: int, settings: Settings) -> dict[str, Any]:
    """For each arm, at the warm start: its gradient towards that of all tokens, and its roles."""
    policy, task = warm_started(warm_start), task_of(warm_start)
    every = range(len(policy.layers))
    step = rolled_out(policy, task, settings, 0, seed=seed, layers=every, entropy=True)
    mask = step.rollout.mask
    masks = role_masks(task, step.texts, mask)
    # A rule that moves the policy and back would break a graph that is there already.
    weighed = {
        arm.name: Weigher(policy, arm, task.probe, settings.steps)(step)
        for arm in ARMS.values()
        if arm is not UNTRAINED
    }
    losses = token_losses(policy, step)

    def gradient(weights: Tensor) -> tuple[Tensor, ...]:
        loss = (losses * weights)[mask].sum() / mask.sum()
        return torch.autograd.grad(loss, policy.parameters, retain_graph=True)

    full = gradient(mask.float())
    found = {}
    for name, weights in weighed.items():
        total = weights[mask].sum().item() or 1.0
        near = tw.gradient_geometry(gradient(weights), full)
        shares = {role: weights[held].sum().item() / total for role, held in masks.items()}
        found[name] = {
            **rounded({"cosine": near.cosine, "projection": near.projection_ratio}),
            "roles": rounded(shares),
        }
    by_role = {
        role: tw.gradient_geometry(gradient(held.float()), full).projection_ratio
        for role, held in masks.items()
    }
    tokens = {role: (held.sum() / mask.sum()).item() for role, held in masks.items()}
    table = roles_of(step, task, step.rollout.attention[task.probe])
    return {
        "arms": found,
        "projection": rounded(by_role),
        "tokens": rounded(tokens),
        "table": table,
    }
