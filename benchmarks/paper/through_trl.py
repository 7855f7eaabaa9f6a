"""The same run trained by TRL under the adapter: only the draws are others."""

import tempfile
import time
import warnings
from typing import Any

import torch
from datasets import Dataset
from tokenweights_lab import load_policy, load_tokenizer
from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer
from transformers import PrinterCallback, TrainerCallback

from paper.arms import Arm
from paper.engine import fast
from paper.tasks import Task, text_of
from paper.training import TOP_P, Settings, accuracies, asked_at, rewards_of, task_of, warm_up
from paper.warm_start import digest, warm_started


class Notes(TrainerCallback):
    """Rewards each rollout of a run, and notes what a record holds of it."""

    def __init__(self, model: Any, task: Task, settings: Settings, seed: int):
        self.model, self.task, self.settings, self.seed = model, task, settings, seed
        self.history: dict[str, list[float]] = {
            name: [] for name in ("reward", "length", "gradient", "unboxed")
        }
        self.evaluations: list[dict[str, float]] = []

    def rewards(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """The rewards of the next rollout, whose prompts must be those of the engine's step."""
        number = len(self.history["reward"])
        asked = asked_at(self.task, self.settings, number, seed=self.seed)
        wanted = [question.prompt for question in asked for _ in range(self.settings.samples)]
        if prompts != wanted:
            raise ValueError("TRL's rollout has other prompts than the engine's")
        rewards = rewards_of(self.task, [text_of(ids) for ids in completion_ids], asked)
        lengths = torch.tensor([len(ids) for ids in completion_ids])
        self.history["reward"].append(rewards.mean().item())
        self.history["length"].append(lengths.double().mean().item())
        self.history["unboxed"].append((rewards == -2).double().mean().item())
        return rewards.tolist()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate after the steps that the engine evaluates after."""
        step, settings = state.global_step, self.settings
        if step in settings.evaluated:
            policy, last = fast.policy_of(self.model), step == settings.steps
            found = accuracies(policy, self.task, settings, seed=self.seed, last=last)
            self.evaluations.append({"step": step, **found})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Note the norm of a step's gradient before it is clipped."""
        if "grad_norm" in (logs or {}):
            self.history["gradient"].append(float(logs["grad_norm"]))


def trainer_of(
    model: Any, task: Task, arm: Arm, seed: int, settings: Settings, folder: str
) -> tuple[TokenWeightsGRPOTrainer, Notes]:
    """A trainer of a run, and what it notes."""
    notes = Notes(model, task, settings, seed)
    steps = [asked_at(task, settings, number, seed=seed) for number in range(settings.steps)]
    arguments = TokenWeightsGRPOConfig(
        output_dir=folder,
        recipe=arm.recipe(task.probe, settings.steps).to_dict(),
        loss_type="dapo",
        beta=0.0,
        scale_rewards="group",
        per_device_train_batch_size=settings.prompts * settings.samples,
        gradient_accumulation_steps=1,
        num_generations=settings.samples,
        max_completion_length=task.longest,
        max_steps=settings.steps,
        max_grad_norm=1.0,
        shuffle_dataset=False,
        temperature=1.0,
        top_p=TOP_P,
        top_k=0,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    # transformers' own warm-up starts at a rate of 0, and has weight decay by default.
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=0.0)
    trainer = TokenWeightsGRPOTrainer(
        model=model,
        processing_class=load_tokenizer(),
        reward_funcs=notes.rewards,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": q.prompt} for step in steps for q in step]),
        callbacks=[notes],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, notes


def train(warm_start: str, arm: Arm, seed: int, settings: Settings) -> dict[str, Any]:
    """Trains through TRL and evaluates; what `training.train` returns, without shares by role."""
    if arm.special:
        raise ValueError(f"{arm.name} is no recipe, and TRL's loop has no place for it")
    clock, task, model = time.process_time(), task_of(warm_start), load_policy()
    policy = warm_started(warm_start)
    fast.write_policy(policy, model)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # TRL calls what the next transformers renames.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        trainer, notes = trainer_of(model, task, arm, seed, settings, folder)
        trainer.train()
    return {
        "warm_start_digest": digest(policy.parameters),
        "history": {name: [round(v, 4) for v in each] for name, each in notes.history.items()},
        "evaluations": notes.evaluations,
        "cpu_seconds": round(time.process_time() - clock, 2),
    }
