"""The trainers: scores become weights on the driver, before the replay buffers see anything."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from openrlhf.trainer import ppo_trainer, ppo_trainer_async
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.utils.utils import zero_pad_sequences
from tokenweights.recipes import weighted_rollout
from tokenweights.report.records import append_log, append_token_records, token_records
from torch import Tensor

from tokenweights_openrlhf.probe import probe_batches
from tokenweights_openrlhf.scores import plain_class

_Trainer: Any = object  # what a mixin calls belongs to the trainer after it


class TokenWeightsExperienceMaker(RemoteExperienceMaker):
    """OpenRLHF's experience maker; the advantages it hands on are times the token weights.

    All experiences of a rollout batch are here at once, whatever ranks and micro-batches they came
    from and will go to. So extrema, counts and weights are those of the whole rollout batch.

    Attributes:
        global_step: The schedule's step.
        metrics: What the last rollout batch was like; see `tokenweights.weighted_rollout`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = self.args.tokenweights
        self.recipe = self.config.token_recipe
        self.global_step = 0
        self.metrics: dict[str, float] = {}
        self._probe_batches: list[dict[str, Tensor]] = []
        self._scores: list[Tensor] | None = None
        self._next_record_step = 0

    def make_experience(self, samples_list: list[Experience]) -> list[Experience]:
        """As OpenRLHF's; also fetches the scores that the policy's pass has left behind."""
        experiences = super().make_experience(samples_list)
        if self.recipe.signal != "none":
            references = self.actor_model_group.async_run_method("take_token_scores")
            copies = self.args.ds.ring_attn_size * self.args.ds.tensor_parallel_size
            self._scores = self._flatten_results(references, copies)
        return experiences

    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """As OpenRLHF's; then advantages are multiplied by weights. Returns are not."""
        experiences = super().compute_advantages_and_returns(experiences)
        # Back in the order of the rollout, which does not depend on how it was split.
        order = torch.tensor([row for made in experiences for row in made.index]).argsort()
        mask = _rows(experiences, order, "action_mask").bool()
        if self.config.gradient_probe_steps is not None and not self._probe_batches:
            names = ("sequences", "attention_mask", "action_mask", "advantages")
            rows = {name: _rows(experiences, order, name) for name in names}
            self._probe_batches = probe_batches(
                rows, self.args.actor.num_nodes * self.args.actor.num_gpus_per_node
            )
        scores = None if self._scores is None else _joined(self._scores)[order]
        most = self.args.rollout.batch_size * self.args.rollout.n_samples_per_prompt
        sample_ids = self.global_step * most + torch.arange(len(mask))
        rollout = weighted_rollout(
            self.recipe,
            scores,
            mask,
            step=self.global_step,
            sample_ids=sample_ids,
            token_groups=_rows(experiences, order, "sequences")[:, 1:],
        )
        self.metrics = rollout.metrics
        if rollout.metrics and scores is not None:
            self._append_records(experiences, order, scores, mask, rollout.weights, sample_ids)
        factors = (rollout.weights * rollout.scale)[order.argsort()]
        sizes = [len(made.advantages) for made in experiences]
        for made, factor in zip(experiences, factors.split(sizes), strict=True):
            made.advantages = made.advantages * factor[:, : made.advantages.shape[1]]
        return experiences

    def gradient_metrics(self, step: int) -> dict[str, float]:
        """What the gradient probe finds after a step; empty where it has none to do."""
        steps, path = self.config.gradient_probe_steps, self.config.gradient_probe_file
        if not self._probe_batches or (step - 1) % steps != 0:
            return {}
        run = self.actor_model_group.async_run_method_batch
        (metrics, *_), *_ = ray.get(run("gradient_metrics", batch=self._probe_batches))
        if path is not None:
            append_log(path, metrics, step=step)
        return metrics

    def _append_records(
        self,
        experiences: list[Experience],
        order: Tensor,
        scores: Tensor,
        mask: Tensor,
        weights: Tensor,
        sample_ids: Tensor,
    ) -> None:
        """Token records of the first prompt's responses, every `token_records_steps` steps."""
        step, path = self.global_step, self.config.token_records
        if path is None or step < self._next_record_step:
            return
        self._next_record_step = step + self.config.token_records_steps
        layers = ray.get(self.actor_model_group.async_run_method("token_score_layers"))[0]
        prompts = [prompt for made in experiences for prompt in made.prompts]
        first = order[: self.args.rollout.n_samples_per_prompt]
        rows = slice(0, len(first))
        records = token_records(
            scores[rows],
            mask[rows],
            step=step,
            sample_ids=sample_ids[rows],
            prompts=[prompts[row] for row in first],
            token_ids=_rows(experiences, first, "sequences")[:, 1:],
            decode=self.tokenizer.decode,
            weights=weights[rows],
            advantages=_rows(experiences, first, "advantages").float(),
            layer=layers,
            entropy_kind=self.recipe.entropy_kind,
            alignment=self.recipe.alignment,
            log_probs=_rows(experiences, first, "action_log_probs").float(),
        )
        append_token_records(path, records)


class TokenWeightsMixin(_Trainer):
    """Token weights for a subclass of OpenRLHF's `BasePPOTrainer`; name it first among the bases.

    The schedule's step is OpenRLHF's global step, which a resumed run goes on with.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.experience_maker = TokenWeightsExperienceMaker(
            self.actor_model_group,
            self.critic_model_group,
            self.reward_model_group,
            self.reference_model_group,
            self.kl_ctl,
            self.strategy,
            self.tokenizer,
        )

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
        if (path := self.experience_maker.config.metrics_file) is not None:
            append_log(path, status, step=next_step)
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


def _rows(experiences: list[Experience], order: Tensor, field: str) -> Tensor:
    """A field of all experiences, padded to the same width, in the given order."""
    return _joined([getattr(made, field) for made in experiences])[order]


def _joined(parts: list[Tensor]) -> Tensor:
    return zero_pad_sequences(parts, side="right")
