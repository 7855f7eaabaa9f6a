"""The weighted gradient equals one written down again from the paper's formulas.

The recomputation shares no code with the library: full logits, eager attention matrices, its own
entropy, weights (Eq. 26-28), advantages and clipped loss.
"""

import copy
import math

import pytest
import tiny
import torch
from transformers import TrainerCallback

from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer

pytestmark = pytest.mark.versions

PROBE = 2  # the middle layer of four
WARMUP = 8
MAX_COMPLETION_LENGTH = 10
CISPO_BOUND = 1.2
LOW2HIGH = {"name": "low2high", "warmup_steps": WARMUP, "temperature": 0.5}
ANCHOR20 = {"name": "anchor20", "denominator": "selected_tokens"}
WEIGHT_SUM = {**LOW2HIGH, "denominator": "weight_sum"}
OWN_ROW = {**LOW2HIGH, "alignment": "own"}


class Recorder(TokenWeightsGRPOTrainer):
    """Keeps the policy and the step of each rollout."""

    def _generate_and_score_completions(self, inputs):
        self.rollout = (copy.deepcopy(self.model.state_dict()), self.state.global_step)
        return super()._generate_and_score_completions(inputs)


class Gradients(TrainerCallback):
    """Keeps, at each optimizer step, the gradient and all that it was made from."""

    def __init__(self):
        self.steps = []
        self.trainer = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trainer, accumulation = self.trainer, args.gradient_accumulation_steps
        first = trainer._step - accumulation
        window = [(first + i) % args.steps_per_generation for i in range(accumulation)]
        self.steps.append(
            {
                "gradient": torch.cat([p.grad.flatten() for p in model.parameters()]),
                "policy": copy.deepcopy(model.state_dict()),
                "rollout": trainer.rollout,
                "batches": [dict(batch) for batch in trainer._buffered_inputs],
                "window": window,
                "source": trainer.score_source,
            }
        )


def log_probs_and_entropy(model, batch, alignment):
    """Log-probabilities of the response and normalized attention entropies of the probe layer."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    real = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    outputs = model(input_ids=ids, attention_mask=real, output_attentions=True, use_cache=False)
    width = batch["completion_ids"].shape[1]
    log_probs = outputs.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[:, -width:, 0]
    attention = outputs.attentions[PROBE].detach().double().mean(1)
    entropy = -torch.xlogy(attention, attention).sum(-1)
    visible = real.cumsum(-1)
    entropy = torch.where(visible > 1, entropy / visible.clamp(min=2).log(), 0.0)
    shift = 1 if alignment == "deciding" else 0
    start = ids.shape[1] - width - shift
    return log_probs, entropy[:, start : start + width]


def group_advantages(rows):
    """Rewards minus the mean of their prompt's group, over its standard deviation."""
    completions = [
        ids[: int(length)].tolist()
        for ids, length in zip(rows["completion_ids"], rows["length"], strict=True)
    ]
    rewards = torch.tensor(tiny.reward(completions))
    advantages = torch.empty_like(rewards)
    for prompt in rows["prompt_ids"].unique(dim=0):
        group = (rows["prompt_ids"] == prompt).all(1)
        advantages[group] = (rewards[group] - rewards[group].mean()) / (rewards[group].std() + 1e-4)
    return advantages


def soft_weights(entropy, mask, step, temperature):
    """Eq. 26-30 as printed: a softmax over the batch, rescaled, between the endpoints."""
    exponential = torch.where(mask, (entropy / temperature).exp(), 0.0)
    share = exponential / exponential.sum()
    smallest, largest = share[mask].min(), share[mask].max()
    rescaled = (share - smallest) / (largest - smallest)
    progress = min(step / WARMUP, 1.0)
    return torch.where(mask, (1 - rescaled) * (1 - progress) + rescaled * progress, 0.0)


def token_losses(new, old, advantages, loss_type):
    """Losses of the tokens before any mean: CISPO's, or the clipped surrogate of the others."""
    ratio = (new - old).exp()
    if loss_type == "cispo":
        return -ratio.clamp(max=CISPO_BOUND).detach() * advantages * new
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def micro_batch_loss(losses, weights, mask, batch, *, loss_type, denominator, batches):
    """A micro-batch's part of the loss; `batches` micro-batches make a rollout batch."""
    counted = {"all_tokens": mask, "selected_tokens": weights > 0, "weight_sum": weights}
    counted = counted[denominator]
    if loss_type == "bnpo":
        return losses[batch].sum() / counted[batch].sum()
    if loss_type == "grpo":
        return (losses[batch].sum(1) / mask[batch].sum(1)).mean()
    if loss_type == "dr_grpo":
        return losses[batch].sum() / (len(losses[batch]) * MAX_COMPLETION_LENGTH)
    return losses[batch].sum() / (counted.sum() / batches)  # dapo, cispo


def anchor_weights(entropy, mask):
    """One for the ceil(T / 5) tokens of lowest entropy in each response, earlier ones first."""
    weights = torch.zeros_like(entropy)
    for row, (values, length) in enumerate(zip(entropy, mask.sum(1).tolist(), strict=True)):
        order = sorted(range(length), key=lambda token: (values[token].item(), token))
        weights[row, order[: math.ceil(length / 5)]] = 1.0
    return weights


def expected_gradient(recorded, recipe, accumulation, loss_type):
    eager = tiny.policy(attn_implementation="eager")
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    rows = {name: torch.cat([batch[name] for batch in recorded["batches"]]) for name in names}
    mask = rows["completion_mask"].bool()
    rows["length"] = mask.sum(1)
    policy, step = recorded["rollout"]
    eager.load_state_dict(policy)
    with torch.no_grad():
        old, entropy = log_probs_and_entropy(eager, rows, recipe.get("alignment", "deciding"))
    if recipe["name"] == "anchor20":
        weights = anchor_weights(entropy, mask)
    else:
        weights = soft_weights(entropy, mask, step, recipe["temperature"])
    eager.load_state_dict(recorded["policy"])
    new, _ = log_probs_and_entropy(eager, rows, "deciding")
    # The weight multiplies the loss here, and the advantage in the adapter.
    advantages = group_advantages(rows)[:, None]
    losses = weights * token_losses(new, old, advantages, loss_type) * mask
    batches = len(recorded["batches"])
    size = len(mask) // batches
    parts = [
        micro_batch_loss(
            losses,
            weights,
            mask,
            slice(batch * size, (batch + 1) * size),
            loss_type=loss_type,
            denominator=recipe.get("denominator", "all_tokens"),
            batches=batches,
        )
        for batch in recorded["window"]
    ]
    (sum(parts) / accumulation).backward()
    return torch.cat([p.grad.flatten() for p in eager.parameters()])


@pytest.mark.parametrize(
    ("recipe", "loss_type", "steps_per_generation", "source"),
    [
        (LOW2HIGH, "dapo", 2, "generation"),
        (LOW2HIGH, "dapo", 4, "old_log_prob_pass"),
        (LOW2HIGH, "grpo", 4, "old_log_prob_pass"),
        (LOW2HIGH, "dr_grpo", 4, "old_log_prob_pass"),
        (LOW2HIGH, "bnpo", 2, "generation"),
        (LOW2HIGH, "cispo", 4, "old_log_prob_pass"),
        (WEIGHT_SUM, "dapo", 2, "generation"),
        (WEIGHT_SUM, "bnpo", 4, "old_log_prob_pass"),
        (ANCHOR20, "dapo", 2, "generation"),
        (ANCHOR20, "dapo", 4, "old_log_prob_pass"),
        (ANCHOR20, "bnpo", 4, "old_log_prob_pass"),
        (ANCHOR20, "cispo", 4, "old_log_prob_pass"),
        ({**ANCHOR20, "denominator": "all_tokens"}, "grpo", 2, "generation"),
        (OWN_ROW, "dapo", 2, "scoring_pass"),
    ],
)
def test_the_gradient_is_the_one_of_the_formulas(
    tmp_path, recipe, loss_type, steps_per_generation, source
):
    gradients = Gradients()
    trainer = tiny.trainer(
        Recorder,
        TokenWeightsGRPOConfig,
        tmp_path,
        recipe=recipe,
        loss_type=loss_type,
        # TRL takes it as the distance from 1, or, for CISPO, as the bound itself.
        epsilon_high=CISPO_BOUND if loss_type == "cispo" else 0.2,
        steps_per_generation=steps_per_generation,
        max_completion_length=MAX_COMPLETION_LENGTH,
        max_grad_norm=0.0,
        max_steps=4,
    )
    gradients.trainer = trainer
    trainer.add_callback(gradients)
    trainer.train()
    assert len(gradients.steps) == 4
    for recorded in gradients.steps:
        assert recorded["source"] == source
        expected = expected_gradient(recorded, recipe, accumulation=2, loss_type=loss_type)
        assert expected.norm() > 1e-2
        assert (recorded["gradient"] - expected).norm() <= 1e-5 * expected.norm()
