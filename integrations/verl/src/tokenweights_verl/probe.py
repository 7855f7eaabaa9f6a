"""Gradient geometry during training: every N steps, on a probe batch that stays the same.

The driver chooses the batch and the steps; the actor's workers take the gradients, through VeRL's
own forward pass.
"""

from functools import partial
from typing import Any

import tokenweights as tw
import torch
import transfer_queue as tq
from tensordict import TensorDict
from tokenweights.adapters import append_log, invalid, preserved, taken_gradients, text_numbers
from torch import Tensor
from torch.nn.functional import pad
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu
from verl.utils.debug import marked_timer
from verl.utils.device import get_device_id
from verl.workers.engine.utils import prepare_micro_batches

from tokenweights_verl.scores import PROBE, attention_columns, placed, response_scores

# What the probe reads of a rollout batch, and what of it the gradients need beside the passes.
IDS, KEYS = ("prompts", "responses"), ("input_ids", "position_ids", "response_mask", "advantages")
KEPT = ("response_mask", "advantages", "sample_ids")
# How VeRL cuts a batch into micro-batches and lays them out.
LAYOUT = ("use_dynamic_bsz", "max_token_len_per_gpu", "micro_batch_size_per_gpu")
LAYOUT = (*LAYOUT, "use_remove_padding", "use_fused_kernels")

# What a mixin calls belongs to the trainer after it; VeRL's own types are too loose to check it.
_Base: Any = object


class GradientProbeMixin(_Base):
    r"""Gradient geometry for a PPO trainer of VeRL; a base of `TokenWeightsMixin`.

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
        self.recipe = placed(self.recipe, self.config)  # now that the model is known
        probed = self._token_weights.gradient_probe_steps is not None
        if probed and self.processor is not None:
            raise invalid("verl", "model", "a text model", "with images", "Leave out the probe.")
        rule = self.recipe if self.recipe.entropy else tw.recipe("low2high")
        self._probe_attention = placed(rule, self.config).entropy if probed else None

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        if self._probe_attention is not None and self._probe_batch is None:
            where = {"keys": batch.keys, "partition_id": batch.partition_id}
            data = tq.kv_batch_get(**where, select_fields=[*IDS, *KEYS])
            valid = data["response_mask"].values().bool()
            if bool((data["advantages"].values()[valid] != 0).any()):
                texts = (data[key].unbind() for key in IDS)
                data["sample_ids"] = text_numbers(self.global_steps, *texts)
                asked = {"tolerance": self._token_weights.gradient_probe_tolerance}
                asked["temperature"] = self.config.actor_rollout_ref.rollout.temperature
                tu.assign_non_tensor(data, **asked)
                tu.assign_non_tensor_data(data, PROBE, self._probe_attention)
                self._probe_batch = data
        return batch

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, Any]) -> KVBatchMeta:
        """VeRL's training step, and the probe after it where one is due."""
        batch, every = super().step(metrics, timing_raw), self._token_weights.gradient_probe_steps
        if self._probe_batch is not None and (self.global_steps - 1) % every == 0:
            with marked_timer("gradient_probe", timing_raw):
                data = self._probe_batch.clone(recurse=False)
                found = tu.get(self.actor_rollout_wg.gradient_metrics(data), "metrics")
            metrics.update(found)
            append_log(self._token_weights.gradient_probe_file, found, step=self.global_steps)
        return batch


def gradient_metrics(engine: Any, data: TensorDict, series: tw.GradientSeries) -> dict[str, float]:
    """The `gradient/*` metrics of a probe batch; the engine's state stays as it is, bit for bit.

    Args:
        engine: An FSDP engine with `TokenWeightsEngineMixin`.
        data: This rank's rows as VeRL trains on them, with `sample_ids`; an attention signal with
            the layers it reads, `temperature` and `tolerance` go along.
        series: Holds the dispersion over the probes so far.

    Returns:
        Finite numbers, the same on every rank.

    Raises:
        TokenWeightsError: If the engine trains in float16, or the projection ratios do not sum to
            one.
    """
    attention, tolerance = (tu.get_non_tensor_data(data, key, None) for key in (PROBE, "tolerance"))
    layout: Any = {key: getattr(engine.engine_config, key) for key in LAYOUT}
    tu.assign_non_tensor(data, **layout, sp_size=engine.ulysses_sequence_parallel_size)
    module, group = engine.module, engine.get_data_parallel_group()
    # Dynamic micro-batches are not consecutive rows; from here on theirs is the order of rows.
    parts = prepare_micro_batches(data=data.to(get_device_id()), dp_group=group)[0]

    def present(part: TensorDict, rows: slice) -> Tensor:
        """Log-probabilities of a micro-batch with their graph; it is asked for all of its rows."""
        output = _outputs(engine, part, forward_only=False)["log_probs"]
        found = response_scores(output, part["response_mask"], alignment="deciding")
        return pad(found, (0, mask.shape[1] - found.shape[1]))

    with engine.train_mode(zero_grad_on_exit=False):
        with preserved("gradient_metrics", module), torch.no_grad():
            found = [p.select(*KEPT).update(_outputs(engine, p, forward_only=True)) for p in parts]
            whole = tu.concat_tensordict(found)
            # Fused kernels give log-probabilities that require a gradient even here.
            old = response_scores(whole["log_probs"], whole["response_mask"], alignment="deciding")
        padded = whole.select("response_mask", "advantages").to_padded_tensor()
        mask, advantages = padded["response_mask"].bool(), padded["advantages"].float()
        losses, sizes = [], [len(part) for part in parts]
        rows = (column.split(sizes) for column in (old, advantages, mask))
        for part, *own in zip(parts, *rows, strict=True):
            losses += tw.unclipped_losses(partial(present, part), *own, micro_batch_size=len(part))
        columns = attention_columns(attention, whole)
        scores = attention(tw.RolloutBatch(mask=mask, attention=columns))
        probe = tw.GradientProbe(module, group=group, gradients=partial(taken_gradients, module))
        tokens = {"scores": scores, "mask": mask, "sample_ids": whole["sample_ids"]}
        options = {"tolerance": tolerance, "autocast": engine._autocast_dtype}
        return series.metrics(probe, losses, **tokens, **options)


def _outputs(engine: Any, part: TensorDict, *, forward_only: bool) -> dict[str, Any]:
    """What a pass gives for each row, which the engine hands to a loss and to nobody else."""
    kept: dict[str, Any] = {}

    def keep(model_output: Any, data: TensorDict, dp_group: Any = None) -> Any:
        kept.update(model_output)
        return torch.zeros(()), {}

    engine.forward_step(part, loss_function=keep, forward_only=forward_only)
    return kept
