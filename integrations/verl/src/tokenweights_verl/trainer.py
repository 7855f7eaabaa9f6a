"""VeRL's PPO trainer with token weights: scores once per rollout batch, weighted advantages."""

from typing import Any

import ray
import transfer_queue as tq
from omegaconf import DictConfig
from tokenweights.adapters import RolloutRecords, append_log
from transfer_queue import KVBatchMeta
from verl.trainer.ppo import v1
from verl.workers.utils.padding import response_to_nested

from tokenweights_verl.config import token_weights_config
from tokenweights_verl.engine import TokenWeightsWorker
from tokenweights_verl.probe import GradientProbeMixin
from tokenweights_verl.scores import COLUMNS, ENTROPY, FIELDS, PROBE, rollout_batch


class TokenWeightsMixin(GradientProbeMixin):
    """Token weights and a gradient probe for a PPO trainer of VeRL; name it first among the bases.

    Once per rollout batch, after VeRL's own advantages, what the recipe reads of the rollout-time
    policy becomes weights, and `advantages` become weighted ones, which VeRL carries through
    mini-batches, epochs and micro-batches. Extrema and counts span the whole rollout batch: the
    trainer sees all of it. With VeRL's separate rollout it is what one update trains on, of which a
    step has `parameter_sync_step`. The schedule begins with the policy's first update.

    Attributes:
        recipe: The recipe, with its layers numbered for the actor's model.

    Raises:
        TokenWeightsError: If `token_weights` is wrong or does not fit the rest of the
            configuration; before anything is started.
    """

    def __init__(self, config: DictConfig) -> None:
        self._token_weights = asked = token_weights_config(config)
        self.recipe = asked.token_recipe
        self._records = RolloutRecords(asked.token_records, every=asked.token_records_steps)
        # VeRL chooses queue and data loader by the name of the mode.
        chosen = config.trainer.v1
        chosen.trainer_mode = chosen.trainer_mode.removeprefix("tokenweights_")
        super().__init__(config)

    @property
    def schedule_step(self) -> int:
        """The schedule's step: 0 up to the policy's first update, at step `critic_warmup`."""
        return max(self.global_steps - max(self.config.trainer.critic_warmup, 1), 0)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:
            if "actor" in str(role):  # alone, or with a rollout, or with a reference as well
                self.role_worker_mapping[role] = ray.remote(TokenWeightsWorker)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        if self.recipe.attention is not None:
            batch.extra_info = {**(batch.extra_info or {}), PROBE: self.recipe.attention}
        batch = super()._compute_old_log_prob(batch, metrics)
        # With LoRA the reference pass runs the same engine, and asks for no entropies.
        (batch.extra_info or {}).pop(PROBE, None)
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        where, step = {"keys": batch.keys, "partition_id": batch.partition_id}, self.global_steps
        read = [COLUMNS[name] for name in self.recipe.columns if name in COLUMNS]
        layers = map(ENTROPY.format, self.recipe.readings)
        data = tq.kv_batch_get(**where, select_fields=sorted({*FIELDS, *read, *layers}))
        rows = rollout_batch(self.recipe, step, batch.keys, data)
        rollout = self.recipe.weighted(rows, step=self.schedule_step)
        metrics.update({f"token_weights/{name}": v for name, v in rollout.metrics.items()})
        decode, prompts = self.tokenizer.decode, data["prompts"]
        prompt = {"prompt": lambda row: decode(prompts[row]), "decode": decode}
        self._records.append(self.recipe, rows, rollout, step=step - 1, **prompt)
        weighted = rows.advantages * rollout.weights * rollout.scale
        data["advantages"] = response_to_nested(weighted, data["response_mask"])
        return tq.kv_batch_put(**where, fields=data.select("advantages"))

    def _compute_metrics(self, batch: KVBatchMeta, metrics: Any, *args: Any, **kwargs: Any) -> None:
        super()._compute_metrics(batch, metrics, *args, **kwargs)
        append_log(self._token_weights.metrics_file, metrics, step=self.global_steps)


@v1.register_trainer("tokenweights_sync")
class TokenWeightsTrainerSync(TokenWeightsMixin, v1.PPOTrainerSync):
    """VeRL's synchronous trainer with token weights; see `TokenWeightsMixin`."""


@v1.register_trainer("tokenweights_colocate_async")
class TokenWeightsTrainerColocateAsync(TokenWeightsMixin, v1.PPOTrainerColocateAsync):
    """The same for the trainer that rolls out a batch ahead, on the GPUs that train."""


@v1.register_trainer("tokenweights_separate_async")
class TokenWeightsTrainerSeparateAsync(TokenWeightsMixin, v1.PPOTrainerSeparateAsync):
    """The same for the trainer that leaves the rollout to GPUs of its own, all the time."""
