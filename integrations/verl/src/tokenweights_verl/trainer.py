"""VeRL's PPO trainers with token weights: scores once per rollout batch, weighted advantages."""

import dataclasses
import inspect
from typing import Any, ClassVar

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from tokenweights._errors import invalid
from tokenweights.recipes import WeightedRollout, weighted_rollout
from tokenweights.report.records import append_token_records, token_records
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.padding import response_to_nested

from tokenweights_verl.config import token_weights_config
from tokenweights_verl.engine import ENTROPY, PROBE, TokenWeightsWorker
from tokenweights_verl.scores import response_scores, sample_ids

# The methods of VeRL that are overridden here, with the parameters relied upon.
CONTRACT = {
    "_init_tokenizer": [],
    "_init_resource_pool_mgr": [],
    "_compute_old_log_prob": ["batch", "metrics"],
    "_compute_advantage": ["batch", "metrics"],
}
ATTENTION_KINDS = ("full_attention", "sliding_attention")

# What a mixin calls belongs to the trainer after it; VeRL's own types are too loose to check it.
_Base: Any = object


class TokenWeightsMixin(_Base):
    """Token weights for a PPO trainer of VeRL; name it first among the bases.

    Once per rollout batch, after VeRL's own advantages, the scores of the rollout-time policy
    become weights, and `advantages` become weighted ones. VeRL carries them through mini-batches,
    epochs and micro-batches as it carries its own. Extrema and counts span the whole rollout batch,
    since the trainer sees all of it. The schedule's step is `global_steps - 1`, so it starts at 0.

    Attributes:
        recipe: The recipe; its `layers` are those that are read.

    Raises:
        TokenWeightsError: If `token_weights` is wrong or does not fit the configuration, or the
            installed VeRL is not one this adapter fits.
    """

    trainer_mode_of_base: ClassVar[str]

    def __init__(self, config: DictConfig) -> None:
        self._check_contract()
        self._token_weights = token_weights_config(config)
        self.recipe = self._token_weights.recipe
        # VeRL chooses queue and data loader by the name of the mode.
        config.trainer.v1.trainer_mode = self.trainer_mode_of_base
        super().__init__(config)

    def _check_contract(self) -> None:
        for method, needed in CONTRACT.items():
            found = inspect.signature(getattr(super(), method, lambda: None)).parameters
            if not set(needed) <= set(found):
                condition = f"with {method}({', '.join(needed)})"
                version = "tokenweights-verl is made for verl>=0.9,<0.10."
                raise invalid(type(self).__name__, "verl", condition, list(found), version)

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        if self.recipe.signal == "attention_entropy":
            model = omega_conf_to_dataclass(self.config.actor_rollout_ref.model)
            text = model.hf_config.get_text_config()
            depth = text.num_hidden_layers
            kinds = getattr(text, "layer_types", None) or ["full_attention"] * depth
            available = [layer for layer, kind in enumerate(kinds) if kind in ATTENTION_KINDS]
            layers = self.recipe.probe_layers(depth, available=available)
            self.recipe = dataclasses.replace(self.recipe, layers=layers)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in {Role.ActorRollout, Role.ActorRolloutRef} & set(self.role_worker_mapping):
            self.role_worker_mapping[role] = ray.remote(TokenWeightsWorker)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        if self.recipe.signal == "attention_entropy":
            batch.extra_info[PROBE] = self.recipe
        batch = super()._compute_old_log_prob(batch, metrics)
        batch.extra_info.pop(PROBE, None)
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        fields = ["advantages", "response_mask", "prompts", "responses", "old_log_probs", "entropy"]
        layers = self.recipe.layers if self.recipe.signal == "attention_entropy" else ()
        fields += [ENTROPY.format(place) for place in range(len(layers or ()))]
        data = tq.kv_batch_get(batch.keys, batch.partition_id, select_fields=fields)
        padded = data.select(*fields[:6]).to_padded_tensor()
        mask = padded["response_mask"].bool()
        scores = self._scores(data, padded, mask)
        ids = sample_ids(self.global_steps, data["prompts"], data["responses"])
        rollout = weighted_rollout(
            self.recipe,
            scores,
            mask,
            step=self.global_steps - 1,
            sample_ids=ids,
            token_groups=padded["responses"],
        )
        metrics.update({f"token_weights/{k}": v for k, v in rollout.metrics.items()})
        self._append_records(batch, data, padded, scores, rollout, ids)
        weighted = padded["advantages"] * rollout.weights * rollout.scale
        nested = response_to_nested(weighted, data["response_mask"])
        return tq.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict({"advantages": nested}, batch_size=len(batch)),
        )

    def _scores(self, data: TensorDict, padded: TensorDict, mask: Tensor) -> Tensor | None:
        if self.recipe.signal == "none":
            return None
        if self.recipe.signal == "predictive_entropy":
            return padded["entropy"].float()
        scores = [
            response_scores(data[key], data["response_mask"], alignment=self.recipe.alignment)
            for key in sorted(key for key in data.keys() if key.startswith(ENTROPY.format("")))
        ]
        return self.recipe.merged_layers(scores, mask)

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
        if path is None or scores is None or (self.global_steps - 1) % every:
            return
        # Keys are prompt, response and turn; the same prompt's share what is before the first "_".
        prompts = [key.split("_")[0] for key in batch.keys]
        rows = [row for row, prompt in enumerate(prompts) if prompt == prompts[0]]
        decode = self.tokenizer.decode
        records = token_records(
            scores[rows],
            padded["response_mask"][rows].bool(),
            step=self.global_steps - 1,
            sample_ids=ids[rows],
            prompts=[decode(data["prompts"][row]) for row in rows],
            token_ids=padded["responses"][rows],
            decode=decode,
            weights=rollout.weights[rows],
            advantages=padded["advantages"][rows],
            layer=self.recipe.layers[0] if len(self.recipe.layers) == 1 else self.recipe.layers,
            entropy_kind=self.recipe.entropy_kind,
            alignment=self.recipe.alignment,
            predictive_entropy=padded["entropy"][rows].float(),
            log_probs=padded["old_log_probs"][rows].float(),
        )
        append_token_records(path, records)


@register_trainer("tokenweights_sync")
class TokenWeightsTrainerSync(TokenWeightsMixin, PPOTrainerSync):
    """VeRL's synchronous trainer with token weights; see `TokenWeightsMixin`."""

    trainer_mode_of_base = "sync"


@register_trainer("tokenweights_colocate_async")
class TokenWeightsTrainerColocateAsync(TokenWeightsMixin, PPOTrainerColocateAsync):
    """VeRL's colocated asynchronous trainer with token weights; see `TokenWeightsMixin`."""

    trainer_mode_of_base = "colocate_async"
