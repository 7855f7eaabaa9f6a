"""The trainers: columns become weights on the driver, before the replay buffers see anything."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import torch
from openrlhf.trainer import ppo_trainer, ppo_trainer_async
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.utils.utils import zero_pad_sequences
from tokenweights.recipes import RolloutBatch
from tokenweights.report.records import append_log
from tokenweights.report.rollouts import RolloutRecords
from torch import Tensor

from tokenweights_openrlhf.probe import probe_batches
from tokenweights_openrlhf.scores import COLUMNS, Columns, plain_class

_Trainer: Any = object  # what a mixin calls belongs to the trainer after it


class TokenWeightsExperienceMaker(RemoteExperienceMaker):
    """OpenRLHF's experience maker; the advantages it hands on are times the token weights.

    All experiences of a rollout batch are here at once, whatever ranks and micro-batches they came
    from and will go to. So extrema, counts and weights are those of the whole rollout batch.

    Attributes:
        global_step: OpenRLHF's global step, from 0.
        metrics: What the last rollout batch was like; see `tokenweights.Recipe.weighted`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = self.args.tokenweights
        self.recipe = self.config.token_recipe
        self.global_step = 0
        self.metrics: dict[str, float] = {}
        self._columns: list[Columns] = []
        self._probe_batches: list[dict[str, Tensor]] = []
        every = self.config.token_records_steps
        self._records = RolloutRecords(self.config.token_records, every=every)

    @property
    def schedule_step(self) -> int:
        """The schedule's step: 0 up to the policy's first update, after `freezing_steps`."""
        return max(self.global_step - max(self.args.critic.freezing_steps + 1, 0), 0)

    def make_experience(self, samples_list: list[Experience]) -> list[Experience]:
        """As OpenRLHF's; also fetches the columns that the policy's pass has left behind."""
        experiences = super().make_experience(samples_list)
        run = self.actor_model_group.async_run_method
        if self.recipe.attention is not None:
            self.recipe = self.recipe.placed(**ray.get(run("attention_layers"))[0])
        copies = self.args.ds.ring_attn_size * self.args.ds.tensor_parallel_size
        self._columns = self._flatten_results(run("take_columns"), copies)
        return experiences

    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """As OpenRLHF's; then advantages are multiplied by weights. Returns are not."""
        experiences = super().compute_advantages_and_returns(experiences)
        # Back in the order of the rollout, which does not depend on how it was split.
        order = torch.tensor([row for made in experiences for row in made.index]).argsort()
        rows = partial(_rows, experiences, order)
        if self.config.gradient_probe_steps is not None and not self._probe_batches:
            names = ("sequences", "attention_mask", "action_mask", "advantages")
            ranks = self.args.actor.num_nodes * self.args.actor.num_gpus_per_node
            self._probe_batches = probe_batches({name: rows(name) for name in names}, ranks)
        batch = self._rollout_batch(rows, order)
        rollout = self.recipe.weighted(batch, step=self.schedule_step)
        self.metrics = rollout.metrics
        prompts = [prompt for made in experiences for prompt in made.prompts]
        texts = {"prompt": lambda row: prompts[order[row]], "decode": self.tokenizer.decode}
        texts["detailed"] = lambda few, own: replace(few, log_probs=rows("action_log_probs")[own])
        self._records.append(self.recipe, batch, rollout, step=self.global_step, **texts)
        factors = (rollout.weights * rollout.scale)[order.argsort()]
        sizes = [len(made.advantages) for made in experiences]
        for made, factor in zip(experiences, factors.split(sizes), strict=True):
            made.advantages = made.advantages * factor[:, : made.advantages.shape[1]]
        return experiences

    def _rollout_batch(self, rows: Callable[[str], Any], order: Tensor) -> RolloutBatch:
        """The columns that the recipe reads, in the rollout's order: each prompt's rows adjoin."""
        asked = {"token_ids", "advantages", *self.recipe.columns}
        columns: Any = {name: rows(field) for name, field in COLUMNS.items() if name in asked}
        for name in self._columns[0] if self._columns else ():
            columns[name] = _joined([made[name] for made in self._columns])[order]
        attention = {name: columns.pop(name) for name in [*columns] if name in self.recipe.readings}
        mask, samples = rows("action_mask").bool(), self.args.rollout.n_samples_per_prompt
        most = self.args.rollout.batch_size * samples
        sample_ids = self.global_step * most + torch.arange(len(mask))
        keys = {"sample_ids": sample_ids, "prompt_ids": sample_ids // samples}
        columns["token_ids"] = columns["token_ids"][:, 1:]
        return RolloutBatch(mask=mask, attention=attention or None, **keys, **columns)

    def gradient_metrics(self, step: int) -> dict[str, float]:
        """What the gradient probe finds after a step; empty where it has none to do."""
        if not self._probe_batches or (step - 1) % self.config.gradient_probe_steps != 0:
            return {}
        run = self.actor_model_group.async_run_method_batch
        (metrics, *_), *_ = ray.get(run("gradient_metrics", batch=self._probe_batches))
        append_log(self.config.gradient_probe_file, metrics, step=step)
        return metrics


class TokenWeightsMixin(_Trainer):
    """Token weights for a subclass of OpenRLHF's `BasePPOTrainer`; name it first among the bases.

    The schedule begins with the policy's first update and follows OpenRLHF's global step, which a
    resumed run goes on with.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with substituted(ppo_trainer, "RemoteExperienceMaker", TokenWeightsExperienceMaker):
            super().__init__(*args, **kwargs)

    def ppo_train(self, global_steps: int) -> dict[str, Any]:
        """As OpenRLHF's; then a gradient probe where one is due, while the engines still sleep."""
        status = super().ppo_train(global_steps)
        return {**status, **self.experience_maker.gradient_metrics(global_steps + 1)}

    def train_step(self, rollout_samples: Any, global_step: int) -> tuple[dict[str, Any], int]:
        """As OpenRLHF's; also passes the step to the experience maker, and metrics to the log."""
        self.experience_maker.global_step = global_step
        status, next_step = super().train_step(rollout_samples, global_step)
        metrics = self.experience_maker.metrics
        status |= {f"token_weights/{name}": metrics[name] for name in metrics}
        append_log(self.experience_maker.config.metrics_file, status, step=next_step)
        return status, next_step


class TokenWeightsPPOTrainer(TokenWeightsMixin, plain_class(ppo_trainer.PPOTrainer)):
    """The synchronous trainer with token weights; see `TokenWeightsMixin`."""


class TokenWeightsTrainingActor(TokenWeightsMixin, plain_class(ppo_trainer_async.TrainingActor)):
    """The training half of the asynchronous trainer with token weights; see `TokenWeightsMixin`."""


class TokenWeightsPPOTrainerAsync(plain_class(ppo_trainer_async.PPOTrainerAsync)):
    """The asynchronous trainer, whose training half is `TokenWeightsTrainingActor`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        training_actor = ray.remote(TokenWeightsTrainingActor)
        with substituted(ppo_trainer_async, "TrainingActor", training_actor):
            super().__init__(*args, **kwargs)


@contextmanager
def substituted(module: Any, name: str, value: Any) -> Iterator[None]:
    """A context in which a module's name stands for something else, for code that looks it up."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _rows(experiences: list[Experience], order: Tensor, field: str) -> Any:
    """A field of all experiences, padded to the same width, in the given order; None without it."""
    parts = [getattr(made, field) for made in experiences]
    return None if parts[0] is None else _joined(parts)[order]


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts[0].dim() == 1 else zero_pad_sequences(parts, side="right")
