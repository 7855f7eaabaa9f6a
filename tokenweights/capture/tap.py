"""The tap: a stand-in for a model's attention function that looks and passes on.

A transformers attention module looks its attention function up at every forward and hands it query
and key after normalization and rotary embedding, before grouped heads are repeated. The tap stands
in for that function, under the same registry key, and passes every call on unchanged: the model
computes what it always does, with the mask it always builds.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenweights._errors import TokenWeightsError, invalid
from tokenweights.capture.captured import CapturedAttention
from tokenweights.capture.checks import refuse_unknown_attention
from tokenweights.capture.layers import chosen_layers, implementation, interface, visible_window


@dataclass(frozen=True)
class AttentionCapture:
    """What a tap has seen so far.

    Attributes:
        calls: For each tapped layer its calls in order: `CapturedAttention`, or what `reduce`
            made of it.
    """

    calls: dict[int, list[Any]] = field(default_factory=dict)


@contextmanager
def capture_attention(
    model: nn.Module,
    layers: Sequence[int],
    *,
    rows: int | None = None,
    packed: bool = False,
    reduce: Callable[[CapturedAttention], Any] | None = None,
) -> Iterator[AttentionCapture]:
    """A context in which every forward of `model` leaves query and key of `layers` behind.

    Nothing is computed and nothing is copied unless asked: a captured tensor is the model's own,
    detached. The context ends the tap, also after an exception; recomputation under gradient
    checkpointing happens after it and is not seen twice.

    Args:
        model: A transformers model, also inside DDP, FSDP or PEFT wrappers.
        layers: Layer indices; negative ones count from the last attention layer.
        rows: Keep only the last `rows` queries of each call; all if None.
        packed: Whether every call is one row of sequences, one after another, told apart by
            position ids that start again at 0, and without padding; the row may be one rank's slice
            of a longer one. Such calls are read with `CapturedAttention.packed_entropy`.
        reduce: If given, called under `torch.no_grad` with each `CapturedAttention`, and only its
            result is kept: pass an entropy to hold one number per query instead of two tensors.

    Yields:
        The `AttentionCapture` that fills up.

    Raises:
        TokenWeightsError: If the model has no tappable attention or no such layer, or, at its
            forward, if a layer attends in a way that query, key and padding do not determine:
            several sequences packed into a row without `packed`, another mask, a static cache,
            a position bias. A block mask of flex attention is not read, so it has to be the causal
            one.

    Example:
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> config = Qwen3Config(
        ...     vocab_size=8,
        ...     hidden_size=16,
        ...     intermediate_size=16,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=2,
        ...     num_key_value_heads=1,
        ...     head_dim=8,
        ... )
        >>> model = Qwen3ForCausalLM(config)
        >>> with capture_attention(model, [1]) as capture:
        ...     _ = model(torch.tensor([[1, 2, 3]]))
        >>> capture.calls[1][0].entropy().shape
        torch.Size([1, 3])
    """
    modules = chosen_layers(model, layers)
    if rows is not None and rows < 1:
        raise invalid("capture_attention", "rows", ">= 1", rows, "Pass None for all queries.")
    if rows is not None and packed:
        hint = "The last queries of a packed row are no response."
        raise invalid("capture_attention", "rows", "None with `packed`", rows, hint)
    capture = AttentionCapture({layer: [] for layer in modules})
    probes = {id(module): layer for layer, module in modules.items()}

    def record(layer: int, query: Tensor, key: Tensor, mask: Any, options: dict) -> None:
        with torch.no_grad():
            module = modules[layer]
            refuse_unknown_attention(layer, module, query, key, mask, options, packed)
            captured = _captured(layer, module, query.detach(), key.detach(), rows, options)
            if packed:
                captured = replace(captured, position_ids=options["position_ids"])
            capture.calls[layer].append(captured if reduce is None else reduce(captured))

    with ExitStack() as taps:
        seen: set[tuple[int, str]] = set()
        for module in modules.values():
            registry, name = interface(module), implementation(module)
            if (id(registry), name) not in seen:
                seen.add((id(registry), name))
                taps.enter_context(_tapped(registry, name, module, probes, record))
        yield capture


@contextmanager
def _tapped(
    registry: Any, name: str, module: Any, probes: dict[int, int], record: Callable
) -> Iterator[None]:
    """One attention function of a registry, replaced under its own key while the context lasts.

    A new key would not do: transformers picks the mask by that key, and an unknown one silently
    drops causal masking.
    """
    original = registry.get_interface(name, _eager_attention(module))

    def tap(
        caller: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        layer = probes.get(id(caller))
        if layer is not None:
            record(layer, query, key, attention_mask, kwargs)
        return original(caller, query, key, value, attention_mask, *args, **kwargs)

    local = registry._local_mapping
    before = local.get(name)
    registry[name] = tap
    try:
        yield
    finally:
        if before is None:
            del registry[name]
        else:
            registry[name] = before


def _captured(
    layer: int, module: Any, query: Tensor, key: Tensor, rows: int | None, options: dict
) -> CapturedAttention:
    scale = options.get("scaling")
    return CapturedAttention(
        layer=layer,
        query=query if rows is None else query[:, :, -rows:],
        key=key,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        window=visible_window(module, options),
        softcap=options.get("softcap"),
        sinks=None if options.get("s_aux") is None else options["s_aux"].detach(),
    )


def _eager_attention(module: Any) -> Callable:
    code = sys.modules[type(module).__module__]

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise TokenWeightsError(f"{type(module).__name__} has no eager attention to pass on to")

    return getattr(code, "eager_attention_forward", missing)
