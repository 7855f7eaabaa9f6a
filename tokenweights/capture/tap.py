"""The tap: a stand-in for a model's attention function that looks and passes on.

A transformers attention module looks its attention function up at every forward and hands it query
and key after normalization and rotary embedding, before grouped heads are repeated. The tap stands
in for the look-up: it finds what the look-up would have found for that very caller, and returns a
function that passes every call on unchanged. So every model of the process computes what it always
does, with the mask it always builds.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.capture.captured import CapturedAttention
from tokenweights.capture.checks import AttentionCall, attended
from tokenweights.capture.counts import counted_calls, recomputing
from tokenweights.capture.layers import AttentionStack, attention_stack, chosen_layers, registry
from tokenweights.capture.masks import Unreadable
from tokenweights.capture.megatron import tapped_layers
from tokenweights.capture.megatron_layers import asked_layers, megatron_layers


@dataclass(frozen=True)
class AttentionCapture:
    """What a tap has seen so far.

    Attributes:
        calls: For each tapped layer its calls in order: `CapturedAttention`, or what `reduce`
            made of it.
    """

    calls: dict[int, list[Any]] = field(default_factory=dict)


@contextmanager
@typed
def capture_attention(
    model: nn.Module,
    layers: Iterable[int],
    *,
    rows: int | None = None,
    packed: bool = False,
    reduce: Callable[[CapturedAttention], Any] | None = None,
) -> Iterator[AttentionCapture]:
    """A context in which every forward of `model` leaves query and key of `layers` behind.

    Nothing is computed and nothing is copied unless asked: a captured tensor is the model's own,
    detached. Under autocast entropies are those of the precision that attention computes in. The
    context ends the tap, also after an exception; what gradient checkpointing computes again in a
    backward pass is not seen twice.

    Args:
        model: A transformers model, also inside DDP, FSDP or PEFT wrappers; or one of
            megatron-core, several chunks of a virtual pipeline as one `torch.nn.ModuleList`.
        layers: Layer indices; negative ones count from the last attention layer. Of a model of
            several stacks those of the one that generates text; pass another as `model`. Of a
            pipeline those of all stages; a stage keeps the calls of its own.
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
            several sequences packed into a row without `packed`, another mask, one that cannot be
            read, a static cache, a position bias, padding inside a sliding window that counts it;
            or if a forward calls a layer's attention function not once but never or several times.

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
    if rows is not None and rows < 1:
        raise invalid("capture_attention", "rows", ">= 1", rows, "Pass None for all queries.")
    if rows is not None and packed:
        hint = "The last queries of a packed row are no response."
        raise invalid("capture_attention", "rows", "None with `packed`", rows, hint)
    spread = megatron_layers(model)
    if spread is not None:
        if rows is not None:
            hint = "Its ranks hold tokens of their own."
            raise invalid("capture_attention", "rows", "None for megatron-core", rows, hint)
        asked = asked_layers(spread, layers)
        capture = AttentionCapture({layer: [] for layer in asked})

        def keep(captured: CapturedAttention) -> None:
            capture.calls[captured.layer].append(captured if reduce is None else reduce(captured))

        with tapped_layers(spread, asked, packed=packed, record=keep):
            yield capture
        return
    stack = _tappable_stack(model)
    modules = chosen_layers(stack, layers)
    capture = AttentionCapture({layer: [] for layer in modules})
    probes = {id(module): layer for layer, module in modules.items()}

    # Compiled models run this as it stands: it looks at values, and it keeps what it sees.
    @torch.compiler.disable
    def record(call: AttentionCall) -> None:
        layer = probes.get(id(call.module))
        if layer is None or recomputing():
            return
        counts[layer] += 1
        with torch.no_grad():
            captured = _captured(call, stack, layer, rows, packed)
            capture.calls[layer].append(captured if reduce is None else reduce(captured))

    with ExitStack() as taps:
        counts = taps.enter_context(counted_calls(stack, modules))
        for functions in {id(found): found for found in map(registry, modules.values())}.values():
            taps.enter_context(_tapped(functions, record))
        yield capture


class _LookUp:
    """Stands in for `get_interface` of a registry of attention functions while someone looks.

    A new key in the registry would not do: transformers picks the mask by that key, and an unknown
    one silently drops causal masking. Nor would another function under the same key: each file of
    models has an eager function of its own, which it names when it looks the key up.
    """

    def __init__(self, original: Callable) -> None:
        self.original = original
        self.recorders: list[Callable] = []

    def __call__(self, name: str, default: Callable) -> Callable:
        function = self.original(name, default)

        def tapped(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            for record in self.recorders:
                options = {**_named(function, args), **kwargs}
                record(AttentionCall(function, module, query, key, attention_mask, options))
            return function(module, query, key, value, attention_mask, *args, **kwargs)

        return tapped


@contextmanager
def _tapped(functions: Any, record: Callable) -> Iterator[None]:
    """A registry whose look-ups tell `record` of every call while the context lasts.

    Contexts may end in any order: the first brings the stand-in, the last takes it away.
    """
    before = vars(functions).get("get_interface")
    look_up = before if isinstance(before, _LookUp) else _LookUp(functions.get_interface)
    functions.get_interface = look_up
    look_up.recorders.append(record)
    try:
        yield
    finally:
        look_up.recorders.remove(record)
        if not look_up.recorders and vars(functions).get("get_interface") is look_up:
            del functions.get_interface
            if inspect.isfunction(look_up.original):  # somebody else's stand-in, not the method
                functions.get_interface = look_up.original


def _named(function: Callable, args: tuple) -> dict[str, Any]:
    """Options that stand behind the mask, by the names that the function has for them."""
    return (
        dict(zip(list(inspect.signature(function).parameters)[5:], args, strict=False))
        if args
        else {}
    )


def _tappable_stack(model: nn.Module) -> AttentionStack:
    stack = attention_stack(model)
    if stack is None or not all(
        hasattr(registry(m), "get_interface") for m in stack.layers.values()
    ):
        raise invalid(
            "capture_attention",
            "model",
            "a transformers (5.1 or newer) model whose attention goes through its attention "
            "interface",
            type(model).__name__,
            "Models with attention code of their own cannot be tapped.",
        )
    return stack


def _captured(
    call: AttentionCall, stack: AttentionStack, layer: int, rows: int | None, packed: bool
) -> CapturedAttention:
    try:
        keys = attended(call, packed=packed)
    except Unreadable as fault:
        raise invalid(
            "capture_attention",
            "layers",
            "whose attention query, key and padding determine: causal, full or sliding-window",
            f"layer {layer} (`{stack.names[layer]}`), {fault}",
            "Probe another layer, or pass one unpacked sequence a row over a growing cache. "
            "A row of several sequences needs `packed=True` and position ids.",
        ) from None
    query, options = call.query.detach(), call.options
    scale, sinks = options.get("scaling"), options.get("s_aux")
    return CapturedAttention(
        layer=layer,
        query=query if rows is None else query[:, :, -rows:],
        key=call.key.detach(),
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        window=keys.window,
        softcap=options.get("softcap"),
        sinks=None if sinks is None else sinks.detach(),
        key_mask=keys.key_mask,
        position_ids=options["position_ids"] if packed else None,
        precision=_autocast(query),
    )


def _autocast(query: Tensor) -> torch.dtype | None:
    """What autocast makes of a float32 query inside every attention function of transformers.

    Normalization and rotary embedding in float32 bring even half-precision projections back to it.
    """
    device = query.device.type
    if query.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
