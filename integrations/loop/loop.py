"""GRPO with token weights in plain torch: the embedded policy, any recipe, no trainer.

python integrations/loop/loop.py --recipe low2high --steps 50 --output runs/loop
"""

import argparse
from pathlib import Path

import torch
from engine import columns, log_probs_of, sampled
from tokenweights_lab import MAX_COMPLETION_TOKENS, load_policy, load_tokenizer, problems

import tokenweights as tw
from tokenweights.report import append_metrics, write_run_json


def train(recipe_name, *, steps, folder, prompts=16, samples=8, rate=5e-5, seed=0):
    """Train the embedded policy, a line of metrics a step, and return it."""
    torch.manual_seed(seed)
    model, tokenizer = load_policy(), load_tokenizer()
    recipe = tw.rollout_recipe(recipe_name, caller="train").on_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    drawn = problems("train", prompts * steps, seed=seed)
    for step in range(steps):
        asked = [p for p in drawn[step * prompts :][:prompts] for _ in range(samples)]
        # A rollout batch, and the advantage of each response over its prompt's others.
        said = sampled(model, tokenizer, [p.prompt for p in asked], longest=MAX_COMPLETION_TOKENS)
        pairs = zip(said.texts, asked, strict=True)
        rewards = torch.tensor([tw.boxed_match_reward(text, p.answer) for text, p in pairs])
        groups = rewards.view(prompts, samples)
        spread = groups.std(1, keepdim=True) + 1e-4
        advantages = ((groups - groups.mean(1, keepdim=True)) / spread).view(-1, 1)
        # Weights of the policy that sampled, for every token.
        read = columns(model, said, recipe)
        rows = torch.arange(len(asked)) + step * len(asked)
        batch = tw.RolloutBatch(
            mask=said.mask,
            sample_ids=rows,
            prompt_ids=rows // samples,
            token_ids=said.tokens,
            advantages=advantages,
            rewards=rewards,
            **{name: read[name] for name in recipe.columns if name in read},
        )
        rollout = recipe.weighted(batch, step=step)
        # One update: the clipped loss of weighted advantages, its denominator the recipe's.
        log_probs, _ = log_probs_of(model, said)
        weighted = advantages * rollout.weights * rollout.scale
        token_loss = tw.clipped_surrogate_loss(log_probs, read["log_probs"], weighted)
        tw.weighted_token_mean(token_loss, said.mask, denominator="all_tokens").backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lengths = said.mask.sum(1).double()
        line = {"step": step, "reward": rewards.mean().item()}
        line["completions/mean_length"] = lengths.mean().item()
        line |= {f"token_weights/{name}": value for name, value in rollout.metrics.items()}
        append_metrics(folder / "metrics.jsonl", line)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="low2high", help="name of a recipe, or its fields")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/loop"))
    given = parser.parse_args()
    (given.output / "metrics.jsonl").unlink(missing_ok=True)
    files = tw.TokenWeightsConfig(given.recipe, metrics_file=str(given.output / "metrics.jsonl"))
    write_run_json(files, trainer="torch", model="lab", data="running total", seed=given.seed)
    train(given.recipe, steps=given.steps, folder=given.output, seed=given.seed)
    print(f"report  tokenweights report {given.output}")
