"""The gradients of a probe batch on an FSDP engine, through VeRL's own forward pass."""

from typing import Any

import tokenweights as tw
import torch
from tensordict import TensorDict
from tokenweights.gradients.preserved import preserved
from torch import Tensor, nn
from torch.nn.functional import pad
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine.utils import prepare_micro_batches

from tokenweights_verl.scores import ENTROPY, PROBE, response_scores

# How VeRL cuts a batch into micro-batches and lays them out.
LAYOUT = ("use_dynamic_bsz", "max_token_len_per_gpu", "micro_batch_size_per_gpu")
LAYOUT = (*LAYOUT, "use_remove_padding", "use_fused_kernels")


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
    # Dynamic micro-batches are not consecutive rows; from here on theirs is the order of rows.
    parts = _micro_batches(engine, data)
    width = max(int(part["response_mask"].offsets().diff().max()) for part in parts)

    def wide(rows: Tensor) -> Tensor:
        return pad(rows, (0, width - rows.shape[1]))

    def responses(part: TensorDict, output: dict[str, Any], key: str, alignment: str) -> Tensor:
        return wide(response_scores(output[key], part["response_mask"], alignment=alignment))

    def log_probs(part: TensorDict) -> Tensor:
        output = _model_output(engine, part, forward_only=False)
        return responses(part, output, "log_probs", "deciding")

    with engine.train_mode(zero_grad_on_exit=False):
        with preserved("gradient_metrics", engine.module), torch.no_grad():
            found = [(part, _model_output(engine, part, forward_only=True)) for part in parts]
        padded = [part.select("response_mask", "advantages").to_padded_tensor() for part in parts]
        masks = [wide(rows["response_mask"]).bool() for rows in padded]
        keys = [ENTROPY.format(place) for place in range(len(attention.layers))]
        layers = [
            torch.cat([responses(*own, key, attention.alignment) for own in found]) for key in keys
        ]
        mask, losses = torch.cat(masks), []
        for own, rows, valid in zip(found, padded, masks, strict=True):
            losses += tw.unclipped_losses(
                lambda _, part=own[0]: log_probs(part),
                responses(*own, "log_probs", "deciding"),
                wide(rows["advantages"]).float(),
                valid,
                micro_batch_size=len(valid),
            )
        module, group = engine.module, engine.get_data_parallel_group()
        return series.metrics(
            tw.GradientProbe(module, group=group, gradients=lambda: _taken_gradients(module)),
            losses,
            scores=attention.merged(layers, mask),
            mask=mask,
            sample_ids=torch.cat([part["sample_ids"] for part in parts]),
            tolerance=tolerance,
            autocast=engine._autocast_dtype,
        )


def _micro_batches(engine: Any, data: TensorDict) -> list[TensorDict]:
    """The micro-batches that the engine would train on."""
    own: Any = {key: getattr(engine.engine_config, key) for key in LAYOUT}
    tu.assign_non_tensor(data, **own, sp_size=engine.ulysses_sequence_parallel_size)
    group = engine.get_data_parallel_group()
    return prepare_micro_batches(data=data.to(get_device_id()), dp_group=group)[0]


def _model_output(engine: Any, part: TensorDict, *, forward_only: bool) -> dict[str, Any]:
    """Log-probabilities with their graph, which the engine hands to a loss and to nobody else."""
    kept: dict[str, Any] = {}

    def keep(model_output: Any, data: TensorDict, dp_group: Any = None) -> Any:
        kept.update(model_output)
        return torch.zeros(()), {}

    engine.forward_step(part, loss_function=keep, forward_only=forward_only)
    return kept


def _taken_gradients(module: nn.Module) -> list[Tensor]:
    """This rank's shards of the gradients, DTensors or flat ones, taken away from the module."""
    shards = []
    for parameter in module.parameters():
        if parameter.grad is not None:
            shards.append(parameter.grad)
            parameter.grad = None
    return shards
