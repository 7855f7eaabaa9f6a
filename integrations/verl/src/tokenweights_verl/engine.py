"""The training engine: VeRL's own FSDP engine, and attention entropy as one more of its outputs."""

from typing import Any

import torch
from tensordict import TensorDict
from tokenweights import GradientSeries
from tokenweights.adapters import environment, joined_readings
from tokenweights.capture import AttentionCapture, CapturedAttention, capture_attention
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig
from verl.workers.utils.padding import build_attention_mask_from_nested

from tokenweights_verl.probe import gradient_metrics
from tokenweights_verl.scores import ENTROPY, PROBE

VENDOR, DEVICES = "tokenweights", ["cuda", "npu", "cpu"]

# What a mixin calls belongs to the engine after it; VeRL's own types are too loose to check it.
_Base: Any = object


class TokenWeightsEngineMixin(_Base):
    """Attention entropy for an FSDP engine or a subclass of it; name it first among the bases.

    A forward-only batch that carries an attention signal comes back with one more output for each
    of its layers, nested like `log_probs`: the entropy of every position's attention, in nats or
    normalized, or what else it reads. Every other batch runs as it always does. Packed and padded
    rows, dynamic micro-batches, adapters and the slices of Ulysses sequence parallelism are the
    engine's own.
    """

    _capture: AttentionCapture | None = None

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """VeRL's step of one micro-batch, with the tap open where a signal asks for it."""
        attention = tu.get_non_tensor_data(data=micro_batch, key=PROBE, default=None)
        if attention is None or not forward_only:
            return super().forward_step(micro_batch, loss_function, forward_only)
        packed = tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True)

        def read(captured: CapturedAttention) -> dict[Any, torch.Tensor]:
            """What is asked for of this rank's real tokens, row after row."""
            # Queries and keys stay in the precision they have; the sums over them are float32.
            with torch.autocast(captured.query.device.type, enabled=False):
                real, of_rows = 0, {"group": self.ulysses_parallel_group}
                if not packed:
                    real = build_attention_mask_from_nested(micro_batch["input_ids"]).bool()
                    of_rows = {"key_mask": real.to(captured.query.device)}
                found = attention.readings(captured, **of_rows)
                return {name: values[real] for name, values in found.items()}

        tap = capture_attention(self.module, attention.layers, packed=packed, reduce=read)
        with tap as self._capture:
            try:
                return super().forward_step(micro_batch, loss_function, forward_only)
            finally:
                self._capture = None

    def prepare_model_outputs(self, **given: Any) -> dict[str, Any]:
        """VeRL's outputs of one micro-batch, and the entropies where the tap is open."""
        outputs = super().prepare_model_outputs(**given)
        if self._capture is not None:
            bounds, places = given["micro_batch"]["input_ids"].offsets(), given["output_args"]
            for name, values in joined_readings(self._capture.calls).items():
                # Slices are gathered, and the padding at the end of a packed row is dropped.
                if "pad_size" in places:
                    values = self._gather_and_unpad_packed(values, places["pad_size"])
                values = torch.nested.nested_tensor_from_jagged(values, bounds.to(values.device))
                outputs[ENTROPY.format(name)] = values
        return outputs


@EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device=DEVICES, vendor=VENDOR)
class TokenWeightsFSDPEngine(TokenWeightsEngineMixin, FSDPEngineWithLMHead):
    """VeRL's FSDP engine with attention entropies; see `TokenWeightsEngineMixin`."""


class TokenWeightsTrainingWorker(TrainingWorker):
    """VeRL's training worker on the engine above, which also probes gradients."""

    def __init__(self, config: TrainingWorkerConfig) -> None:
        # How VeRL lets one choose among engines of a kind.
        with environment("VERL_ENGINE_VENDOR", VENDOR):
            super().__init__(config)
        self._series = GradientSeries()

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"))
    def gradient_metrics(self, data: TensorDict) -> TensorDict:
        """The `gradient/*` metrics of a probe batch; see `probe.gradient_metrics`."""
        metrics = gradient_metrics(self.engine, data, self._series)
        return tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": metrics})


class TokenWeightsWorker(DetachActorWorker):
    """VeRL's actor worker with the engine above for the actor; a reference model keeps VeRL's.

    It derives from the worker that can keep older weights, as a separate rollout asks for.
    """

    actor_worker_cls = TokenWeightsTrainingWorker

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def gradient_metrics(self, data: TensorDict) -> TensorDict:
        """The `gradient/*` metrics of a probe batch under the actor; see above."""
        return self.actor.gradient_metrics(data)
