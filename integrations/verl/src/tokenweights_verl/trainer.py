"""VeRL's PPO trainer with token weights: scores once per rollout batch, weighted advantages."""

from dataclasses import replace
from typing import Any

import ray
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from tokenweights.recipes import WeightedRollout, weighted_rollout
from tokenweights.report.records import append_log, append_token_records, token_records
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.utils.padding import response_to_nested

from tokenweights_verl.config import token_weights_config
from tokenweights_verl.engine import TokenWeightsWorker
from tokenweights_verl.probe import GradientProbeMixin
from tokenweights_verl.scores import ENTROPY, PROBE, attention_layers, response_scores, sample_ids

FIELDS = ("advantages", "response_mask", "prompts", "responses", "old_log_probs", "entropy")

# What a mixin calls belongs to the trainer after it; VeRL's own types are too loose to check it.
_Base: Any = object


class TokenWeightsMixin(_Base):
    """Token weights for a PPO trainer of VeRL; name it first among the bases.

    Once per rollout batch, after VeRL's own advantages, the scores of the rollout-time policy
    become weights, and `advantages` become weighted ones, which VeRL carries through mini-batches,
    epochs and micro-batches. Extrema and counts span the whole rollout batch: the trainer sees all
    of it. The schedule's step is `global_steps - 1`, so that it starts at 0.

    Attributes:
        recipe: The recipe.

    Raises:
        TokenWeightsError: If `token_weights` is wrong or does not fit the rest of the
            configuration; before anything is started.
    """

    def __init__(self, config: DictConfig) -> None:
        self._token_weights = token_weights_config(config)
        self.recipe = self._token_weights.token_recipe
        self._layers: tuple[int, ...] = ()  # those that are read
        # VeRL chooses queue and data loader by the name of the mode.
        mode = config.trainer.v1.trainer_mode
        config.trainer.v1.trainer_mode = mode.removeprefix("tokenweights_")
        super().__init__(config)

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        self._layers = attention_layers(self.recipe, self.config)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in {Role.ActorRollout, Role.ActorRolloutRef} & set(self.role_worker_mapping):
            self.role_worker_mapping[role] = ray.remote(TokenWeightsWorker)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        if self.recipe.signal == "attention_entropy":
            probe = replace(self.recipe, layers=self._layers)
            batch.extra_info = {**(batch.extra_info or {}), PROBE: probe}
        batch = super()._compute_old_log_prob(batch, metrics)
        # With LoRA the reference pass runs the same engine, and asks for no entropies.
        (batch.extra_info or {}).pop(PROBE, None)
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        where = {"keys": batch.keys, "partition_id": batch.partition_id}
        keys = [ENTROPY.format(place) for place in range(len(self._layers))]
        data = tq.kv_batch_get(**where, select_fields=[*FIELDS, *keys])
        padded = data.select(*FIELDS).to_padded_tensor()
        mask = padded["response_mask"].bool()
        scores = padded["entropy"].float() if self.recipe.signal == "predictive_entropy" else None
        if keys:
            lengths, alignment = data["response_mask"], self.recipe.alignment
            layers = [response_scores(data[key], lengths, alignment=alignment) for key in keys]
            scores = self.recipe.merged_layers(layers, mask)
        ids = sample_ids(self.global_steps, data["prompts"], data["responses"])
        step, types = self.global_steps - 1, padded["responses"]
        rollout = weighted_rollout(
            self.recipe, scores, mask, step=step, sample_ids=ids, token_groups=types
        )
        metrics.update({f"token_weights/{name}": v for name, v in rollout.metrics.items()})
        self._append_records(batch, data, padded, scores, rollout, ids)
        weighted = padded["advantages"] * rollout.weights * rollout.scale
        nested = response_to_nested(weighted, data["response_mask"])
        fields = TensorDict({"advantages": nested}, batch_size=len(batch))
        return tq.kv_batch_put(**where, fields=fields)

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._compute_metrics(batch, metrics, *args, **kwargs)
        if path := self._token_weights.metrics_file:
            append_log(path, metrics, step=self.global_steps)

    def _append_records(
        self,
        batch: KVBatchMeta,
        data: TensorDict,
        padded: TensorDict,
        scores: Tensor | None,
        rollout: WeightedRollout,
        ids: Tensor,
    ) -> None:
        """Token records of one prompt's responses, every `token_records_steps` steps."""
        path, every = self._token_weights.token_records, self._token_weights.token_records_steps
        if not path or scores is None or not rollout.metrics or (self.global_steps - 1) % every:
            return
        mask, decode = padded["response_mask"].bool(), self.tokenizer.decode
        # A key is prompt, response and turn, with "_" between them; padding has no valid token.
        prompts = [key.split("_")[0] for key in batch.keys]
        real = [row for row, valid in enumerate(mask.any(-1).tolist()) if valid]
        rows = [row for row in real if prompts[row] == prompts[real[0]]]
        records = token_records(
            scores[rows],
            mask[rows],
            step=self.global_steps - 1,
            sample_ids=ids[rows],
            prompts=[decode(data["prompts"][row]) for row in rows],
            token_ids=padded["responses"][rows],
            decode=decode,
            weights=rollout.weights[rows],
            advantages=padded["advantages"][rows].float(),
            layer=self._layers,
            entropy_kind=self.recipe.entropy_kind,
            alignment=self.recipe.alignment,
            predictive_entropy=padded["entropy"][rows].float(),
            log_probs=padded["old_log_probs"][rows].float(),
        )
        append_token_records(path, records)


@register_trainer("tokenweights_sync")
class TokenWeightsTrainerSync(TokenWeightsMixin, GradientProbeMixin, PPOTrainerSync):
    """VeRL's synchronous trainer with token weights and a gradient probe; see the mixins."""
