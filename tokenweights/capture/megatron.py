"""The tap of megatron-core models: a hook before the core attention of a layer.

Megatron-core calls the module `core_attention` of a layer with query and key after normalization
and rotary embedding, of this rank's heads (tensor parallelism) and tokens (context parallelism, in
zigzag order), as `token batch heads dim` or, packed, as `token heads dim`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from tokenweights._errors import TokenWeightsError, invalid
from tokenweights.capture.captured import CapturedAttention
from tokenweights.capture.counts import counted_calls, recomputing
from tokenweights.capture.masks import Unreadable
from tokenweights.capture.megatron_call import ENGINE, LOCAL, captured_call
from tokenweights.capture.megatron_layers import MegatronLayers, runs

_ATTENTION = "megatron.core.transformer.attention.SelfAttention"
_NAMES = ("query", "key", "value", "attention_mask", "attn_mask_type", "attention_bias")
_NAMES = (*_NAMES, "packed_seq_params")
_GRAPH = "a graph runs no hook"
# Settings of the model under which the hook sees something else than what is attended, or nothing.
_OFF = {
    "fp8": "attention in 8 bits rounds query and key in its own way",
    "fp4": "attention in 4 bits rounds query and key in its own way",
    "multi_latent_attention": "the keys of latent attention have another scale and other parts",
    "experimental_attention_variant": "it attends to keys that it selects",
    "mtp_num_layers": "layers that predict later tokens attend as well",
    "enable_cuda_graph": _GRAPH,
    "external_cuda_graph": _GRAPH,
    "flash_decode": "it fuses the rotary embedding with attention",
    "use_kitchen_attention": "it rounds query and key in its own way",
}


@contextmanager
def tapped_layers(
    found: MegatronLayers,
    layers: list[int],
    *,
    packed: bool,
    record: Callable[[CapturedAttention], None],
) -> Iterator[None]:
    """A context that tells `record` of every attention call of those layers on this rank."""
    with ExitStack() as taps:
        for stack in found.stacks:
            own = [layer for layer in layers if layer in stack.layers]
            counts = taps.enter_context(counted_calls(stack, own))
            for layer in own:
                attention: Any = stack.layers[layer]
                _require_readable(attention, layer, stack.names[layer])
                hook = _hook(attention, layer, stack.names[layer], packed, counts, record)
                core: nn.Module = attention.core_attention
                taps.callback(core.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _hook(
    attention: Any,
    layer: int,
    name: str,
    packed: bool,
    counts: Counter[int],
    record: Callable[[CapturedAttention], None],
) -> Callable[..., None]:
    def before(core: nn.Module, args: tuple, kwargs: dict) -> None:
        if recomputing():
            return
        counts[layer] += 1
        given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        with torch.no_grad():
            try:
                captured = captured_call(attention, core, given, layer, packed)
            except Unreadable as fault:
                raise _refusal(layer, name, str(fault)) from None
            record(captured)

    untraced: Callable[..., Any] = torch.compiler.disable
    return untraced(before)


def _require_readable(attention: Any, layer: int, name: str) -> None:
    config = attention.config
    for setting, reason in _OFF.items():
        if getattr(config, setting, None):
            raise _refusal(layer, name, f"`{setting}={getattr(config, setting)}`: {reason}")
    if getattr(config, "cuda_graph_impl", "none") not in (None, "none"):
        raise _refusal(layer, name, f"`cuda_graph_impl={config.cuda_graph_impl}`: {_GRAPH}")
    if not runs(attention, _ATTENTION):
        raise _refusal(layer, name, f"an attention module `{type(attention).__name__}`")
    core = attention.core_attention
    if not (runs(core, LOCAL) or runs(core, ENGINE)):
        raise _refusal(layer, name, f"a core attention `{type(core).__name__}`")


def _refusal(layer: int, name: str, fault: str) -> TokenWeightsError:
    return invalid(
        "capture_attention",
        "layers",
        "whose attention query, key and padding determine: causal, full or sliding-window",
        f"layer {layer} (`{name}`), {fault}",
        "Change the setting, or probe another layer.",
    )
