"""Gradient geometry during training: every N steps, on a probe batch that stays the same."""

from typing import Any

import tokenweights as tw
import transfer_queue as tq
from tensordict import TensorDict
from tokenweights._errors import invalid
from tokenweights.recipes.identity import text_numbers
from tokenweights.report.records import append_log
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu
from verl.utils.debug import marked_timer

from tokenweights_verl.scores import PROBE, placed

# What the probe reads of a rollout batch.
IDS, KEYS = ("prompts", "responses"), ("input_ids", "position_ids", "response_mask", "advantages")

# What a mixin calls belongs to the trainer after it; VeRL's own types are too loose to check it.
_Base: Any = object


class GradientProbeMixin(_Base):
    r"""Gradient geometry for a PPO trainer of VeRL; name it after `TokenWeightsMixin`.

    The probe batch is the first rollout batch with a non-zero advantage, before any weights: there
    the recipes and plain VeRL are looked at alike. After training steps 1, 1 + N, 1 + 2N, ... its
    tokens are sorted anew by the policy's attention entropy, and the gradient of
    $-A_t \pi(t) / \pi_{probe}(t)$, at ratio 1, is taken apart into the `gradient/*` metrics that
    `tokenweights.GradientSeries` lists.

    Parameters, optimizer state, gradients and random state of the workers stay as they are, so that
    training with and without the probe is the same. A probe costs fifteen forward and backward
    passes over the probe batch and one forward pass, and one copy of the gradient's shards. A
    resumed run takes a new probe batch and starts the dispersion anew. `token_weights` in the
    configuration says when, where to and how exact.

    Raises:
        TokenWeightsError: If the model sees images.
    """

    _probe_batch: TensorDict | None = None

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        if self._token_weights.gradient_probe_steps is None:
            return
        if self.processor is not None:
            hint = "Leave out the probe."
            raise invalid("verl", "model", "a text model", "one with images", hint)
        rule = self.recipe if self.recipe.attention else tw.recipe("low2high")
        self._probe_attention = placed(rule, self.config).attention

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        if self._token_weights.gradient_probe_steps is not None and self._probe_batch is None:
            where = {"keys": batch.keys, "partition_id": batch.partition_id}
            data = tq.kv_batch_get(**where, select_fields=[*IDS, *KEYS])
            valid = data["response_mask"].values().bool()
            if bool((data["advantages"].values()[valid] != 0).any()):
                texts = (data[key].unbind() for key in IDS)
                data["sample_ids"] = text_numbers(self.global_steps, *texts)
                self._probe_batch = data
        return batch

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, Any]) -> KVBatchMeta:
        """VeRL's training step, and the probe after it where one is due."""
        batch, every = super().step(metrics, timing_raw), self._token_weights.gradient_probe_steps
        if self._probe_batch is not None and (self.global_steps - 1) % every == 0:
            with marked_timer("gradient_probe", timing_raw):
                found = self._probed(self._probe_batch.clone(recurse=False))
            metrics.update(found)
            if path := self._token_weights.gradient_probe_file:
                append_log(path, found, step=self.global_steps)
        return batch

    def _probed(self, data: TensorDict) -> dict[str, float]:
        tolerance = self._token_weights.gradient_probe_tolerance
        temperature = self.config.actor_rollout_ref.rollout.temperature
        tu.assign_non_tensor(data, temperature=temperature, tolerance=tolerance)
        tu.assign_non_tensor_data(data, PROBE, self._probe_attention)
        return tu.get(self.actor_rollout_wg.gradient_metrics(data), "metrics")
