"""The Megatron engine: VeRL's own, and attention entropy as one more of its outputs."""

from typing import Any

import torch
from megatron.core import parallel_state as mpu
from tokenweights.adapters import SequenceEntropies
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry, MegatronEngineWithLMHead

from tokenweights_verl.engine import DEVICES, VENDOR
from tokenweights_verl.scores import ENTROPY, PROBE

NUMBERS = "row_numbers"


class TokenWeightsMegatronEngineMixin:
    """Attention entropy for a Megatron engine or a subclass; name it first among the bases.

    A forward-only batch that carries an attention signal comes back with one more output for each
    of its layers, as from an FSDP engine. Only the stage that holds a layer sees its attention;
    the entropies go to the stage with the log-probabilities once the batch is done.
    """

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False):
        """VeRL's pass over a batch, with the tap open where a signal asks for it."""
        attention = tu.get_non_tensor_data(data=data, key=PROBE, default=None)
        if attention is None or not forward_only:
            return super().forward_backward_batch(data, loss_function, forward_only)
        bounds, group = data["input_ids"].offsets(), mpu.get_pipeline_model_parallel_group()
        # Micro-batches are no consecutive rows, and only the last stage learns of their order.
        data[NUMBERS] = torch.arange(len(data), device=bounds.device)
        self._entropies = SequenceEntropies(attention)
        with self._entropies.tapped(self.module, packed=self.engine_config.use_remove_padding):
            output = super().forward_backward_batch(data, loss_function, forward_only)
        for layer, values in self._entropies.on_all_stages(group=group).items():
            nested = torch.nested.nested_tensor_from_jagged(values, bounds.to(values.device))
            output.get("model_output", {})[ENTROPY.format(layer)] = nested
        return output

    def forward_step(self, batch_iter: Any, *given: Any, **named: Any) -> Any:
        """VeRL's step of one micro-batch through one chunk of the model."""
        batch = next(batch_iter)
        if NUMBERS in batch.keys():
            self._entropies.begin(batch[NUMBERS], batch["input_ids"].offsets().diff())
        return super().forward_step(iter([batch]), *given, **named)


@EngineRegistry.register("language_model", "megatron", device=DEVICES, vendor=VENDOR)
class TokenWeightsMegatronEngine(TokenWeightsMegatronEngineMixin, MegatronEngineWithLMHead):
    """VeRL's Megatron engine with attention entropies."""
