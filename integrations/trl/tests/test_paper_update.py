"""One update of the fast engine is one optimizer step of TRL under the adapter."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenweights import RolloutBatch, boxed_match_reward, recipe
from tokenweights_lab import load_policy, load_tokenizer, problems

from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer

PROMPTS, SAMPLES, LONGEST = 2, 8, 81
# Adam's first step hides the size of a gradient, plain descent shows it.
OPTIMIZERS = {
    "sgd": (0.1, lambda weights, rate: torch.optim.SGD(weights, lr=rate)),
    "adamw_torch": (1e-4, lambda weights, rate: torch.optim.AdamW(weights, rate, weight_decay=0)),
}
ENGINE = Path(__file__).parents[2] / "loop" / "fast.py"

spec = importlib.util.spec_from_file_location("loop_fast", ENGINE)
assert spec is not None and spec.loader is not None
fast = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = fast
spec.loader.exec_module(fast)


def rollout_of(policy, texts, layers):
    tokenizer = load_tokenizer()
    return fast.sampled(
        policy,
        [tokenizer(text).input_ids for text in texts],
        samples=SAMPLES,
        longest=LONGEST,
        generator=torch.Generator().manual_seed(0),
        layers=layers,
        entropy=True,
    )


def updated(policy, rollout, made, rewards, optimizer):
    """The policy after one step of the engine."""
    advantages = fast.group_advantages(rewards, SAMPLES)[:, None]
    batch = RolloutBatch(
        mask=rollout.mask,
        advantages=advantages,
        attention=rollout.attention or None,
        predictive_entropy=rollout.predictive_entropy,
    )
    weighted = made.weighted(batch, step=0)
    fast.accumulate_gradient(policy, rollout, advantages * weighted.weights * weighted.scale)
    torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)
    rate, make = OPTIMIZERS[optimizer]
    make(policy.parameters, rate).step()
    model = load_policy()
    fast.write_policy(policy, model)
    return model


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("full", "sgd"),
        ("low2high", "sgd"),
        ("anchor20", "sgd"),
        ("predictive_high20", "sgd"),
        ("low2high", "adamw_torch"),
    ],
)
def test_one_update_is_one_step_of_the_trainer(tmp_path, name, optimizer):
    model = load_policy()
    made = recipe(name).on_model(model)
    policy, asked = fast.policy_of(model), problems("train", PROMPTS)
    rollout = rollout_of(policy, [problem.prompt for problem in asked], made.layers)
    texts = load_tokenizer().batch_decode(rollout.tokens, skip_special_tokens=True)
    answers = [problem.answer for problem in asked for _ in range(SAMPLES)]
    pairs = list(zip(texts, answers, strict=True))
    rewards = torch.tensor([boxed_match_reward(text, answer) for text, answer in pairs])
    assert len(rewards.unique()) > 1

    def said(prompts, trainer):
        # The trainer asks for each prompt as often as there are samples.
        order = [
            [problem.prompt for problem in asked].index(prompt) for prompt in prompts[::SAMPLES]
        ]
        rows = [row for place in order for row in range(place * SAMPLES, (place + 1) * SAMPLES)]
        return {
            "prompt_ids": [load_tokenizer()(prompt).input_ids for prompt in prompts],
            "completion_ids": [rollout.tokens[row][rollout.mask[row]].tolist() for row in rows],
            "logprobs": [rollout.log_probs[row][rollout.mask[row]].tolist() for row in rows],
        }

    def reward(prompts, completions, answer, **kwargs):
        pairs = zip(completions, answer, strict=True)
        return [boxed_match_reward(text, wanted) for text, wanted in pairs]

    config = TokenWeightsGRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        recipe=name,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        temperature=1.0,
        top_p=0.95,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        max_steps=1,
        optim=optimizer,
        learning_rate=OPTIMIZERS[optimizer][0],
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = [{"prompt": problem.prompt, "answer": problem.answer} for problem in asked]
    trained = load_policy()
    trainer = TokenWeightsGRPOTrainer(
        trained,
        reward,
        config,
        Dataset.from_list(data),
        processing_class=load_tokenizer(),
        rollout_func=said,
    )
    trainer.train()
    expected = dict(trained.named_parameters())
    before = dict(model.named_parameters())
    for key, value in updated(policy, rollout, made, rewards, optimizer).named_parameters():
        moved = (expected[key] - before[key]).abs().max()
        assert moved > 1e-5, key
        off = (value - expected[key]).abs()
        if optimizer == "sgd":
            assert off.max() <= 1e-5 * max(1.0, before[key].detach().abs().max().item()), key
            assert off.max() <= 1e-3 * moved, key
        else:
            # Adam's first step divides a gradient by its size: one near 0 may point anywhere.
            assert (off <= 1e-5).float().mean() > 0.999, key
