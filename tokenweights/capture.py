"""Taps query and key of chosen layers of a transformers model, under any attention backend.

A transformers attention module looks its attention function up at every forward and hands it query
and key after normalization and rotary embedding, before grouped heads are repeated. The tap stands
in for that function, under the same registry key, and passes every call on unchanged: the model
computes what it always does, with the mask it always builds.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenweights._errors import TokenWeightsError, invalid
from tokenweights._typing import typed
from tokenweights.attention import EntropyKind, attention_entropy

_CAUSAL_LAYERS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class CapturedAttention:
    """Query and key of one attention call, detached, with all that shapes its distribution.

    Attributes:
        layer: Index of the layer.
        query: Rotated queries, `batch heads query dim`: the last `query` positions of `key`.
        key: Rotated keys, `batch kv_heads key dim`.
        scale: Factor on the scores.
        window: Visible keys of a sliding-window layer, the query included, or None.
        softcap: Bound of a soft cap on the scores, or None.
        sinks: Extra logit of each head in the softmax denominator, ` heads`, or None.
    """

    layer: int
    query: Tensor
    key: Tensor
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    def entropy(
        self,
        *,
        key_mask: Bool[Tensor, "batch key"] | None = None,
        kind: EntropyKind = "normalized",
        top_k: int = 256,
        fixed_k: int = 256,
    ) -> Float[Tensor, "batch query"]:
        """Entropy of the head-averaged attention distribution of each captured query.

        Args:
            key_mask: True for real keys; None if there is no padding.
            kind: As in `tokenweights.attention_entropy`.
            top_k: As in `tokenweights.attention_entropy`.
            fixed_k: As in `tokenweights.attention_entropy`.

        Returns:
            Entropies, 0 for padded queries.
        """
        return attention_entropy(
            self.query,
            self.key,
            kind=kind,
            top_k=top_k,
            fixed_k=fixed_k,
            scale=self.scale,
            key_mask=key_mask,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
        )


@dataclass(frozen=True)
class AttentionCapture:
    """What a tap has seen so far.

    Attributes:
        calls: For each tapped layer its calls in order: `CapturedAttention`, or what `reduce`
            made of it.
    """

    calls: dict[int, list[Any]] = field(default_factory=dict)


def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The attention modules of a model whose query and key can be tapped, by layer index.

    Args:
        model: A transformers model, also inside DDP, FSDP or PEFT wrappers.

    Returns:
        Layer index to module, in ascending order; empty if the model has no such module.
    """
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and hasattr(module, "is_causal") and _interface(module):
            found.setdefault(layer, module)
    return dict(sorted(found.items()))


@contextmanager
def capture_attention(
    model: nn.Module,
    layers: Sequence[int],
    *,
    rows: int | None = None,
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
        reduce: If given, called under `torch.no_grad` with each `CapturedAttention`, and only its
            result is kept: pass an entropy to hold one number per query instead of two tensors.

    Yields:
        The `AttentionCapture` that fills up.

    Raises:
        TokenWeightsError: If the model has no tappable attention or no such layer, or, at its
            forward, if a layer attends in a way that query, key and padding do not determine:
            several sequences packed into a row, another mask, a static cache, a position bias. A
            block mask of flex attention is not read, so it has to be the causal one.

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
    modules = _chosen_modules(model, layers)
    if rows is not None and rows < 1:
        raise invalid("capture_attention", "rows", ">= 1", rows, "Pass None for all queries.")
    capture = AttentionCapture({layer: [] for layer in modules})
    probes = {id(module): layer for layer, module in modules.items()}

    def record(layer: int, query: Tensor, key: Tensor, mask: Any, options: dict) -> None:
        with torch.no_grad():
            module = modules[layer]
            _refuse_unknown_attention(layer, module, query, key, mask, options)
            captured = _captured(layer, module, query.detach(), key.detach(), rows, options)
            capture.calls[layer].append(captured if reduce is None else reduce(captured))

    with ExitStack() as taps:
        seen: set[tuple[int, str]] = set()
        for module in modules.values():
            interface, name = _interface(module), _implementation(module)
            if (id(interface), name) not in seen:
                seen.add((id(interface), name))
                taps.enter_context(_tapped(interface, name, module, probes, record))
        yield capture


@typed
def middle_layer(depth: int) -> int:
    """The default probe: layer 20 of 36 in the paper, and the same share of any other depth.

    Args:
        depth: Number of layers.

    Returns:
        A layer index.

    Example:
        >>> [middle_layer(depth) for depth in (1, 4, 28, 36)]
        [0, 2, 15, 20]
    """
    if depth < 1:
        raise invalid("middle_layer", "depth", ">= 1", depth, "Pass the number of layers.")
    return depth * 5 // 9


@contextmanager
def _tapped(
    interface: Any, name: str, module: Any, probes: dict[int, int], record: Callable
) -> Iterator[None]:
    """One attention function of a registry, replaced under its own key while the context lasts.

    A new key would not do: transformers picks the mask by that key, and an unknown one silently
    drops causal masking.
    """
    original = interface.get_interface(name, _eager_attention(module))

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

    local = interface._local_mapping
    before = local.get(name)
    interface[name] = tap
    try:
        yield
    finally:
        if before is None:
            del interface[name]
        else:
            interface[name] = before


def _captured(
    layer: int, module: Any, query: Tensor, key: Tensor, rows: int | None, options: dict
) -> CapturedAttention:
    scale = options.get("scaling")
    return CapturedAttention(
        layer=layer,
        query=query if rows is None else query[:, :, -rows:],
        key=key,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        window=_window(module, options),
        softcap=options.get("softcap"),
        sinks=None if options.get("s_aux") is None else options["s_aux"].detach(),
    )


def _window(module: Any, options: dict) -> int | None:
    window = options.get("sliding_window")
    if window is None and _layer_type(module) == "sliding_attention":
        window = getattr(module, "sliding_window", None) or module.config.sliding_window
    return window


def _refuse_unknown_attention(
    layer: int, module: Any, query: Tensor, key: Tensor, mask: Any, options: dict
) -> None:
    kind = _layer_type(module)
    if kind not in _CAUSAL_LAYERS:
        reason = f"a layer of type {kind!r}"
    elif not module.is_causal:
        reason = "a layer that is not causal"
    elif options.get("position_bias") is not None:
        reason = "a layer with a position bias"
    elif options.get("cu_seq_lens_q") is not None or (mask is None and _restarts(options)):
        reason = "several sequences packed into a row"
    elif isinstance(mask, Tensor) and mask.dim() == 4:
        if _is_causal_mask(mask, query.shape[2], key.shape[2], _window(module, options)):
            return
        reason = "a mask other than causal order, window and padding (or a static cache)"
    else:
        return
    raise invalid(
        "capture_attention",
        "layers",
        "whose attention query, key and padding determine: causal, full or sliding-window",
        f"layer {layer}, {reason}",
        "Probe another layer, or pass one unpacked sequence a row over a growing cache.",
    )


def _restarts(options: dict) -> bool:
    """Whether positions fall within a row: without a mask that means packed sequences."""
    positions = options.get("position_ids")
    return isinstance(positions, Tensor) and bool((positions.diff(dim=-1) < 0).any())


def _is_causal_mask(mask: Tensor, queries: int, keys: int, window: int | None) -> bool:
    """Whether a 4-D mask hides what order, window and padding hide, and nothing else.

    A key counts as padding if no query sees it. Rows of padded queries may show anything.
    """
    visible = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0]
    visible = visible[..., :keys]
    positions = torch.arange(keys, device=mask.device)
    distance = positions[keys - queries :, None] - positions
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    own = visible.diagonal(keys - queries, dim1=-2, dim2=-1)  # what each query shows of itself
    real_rows = own[..., None]
    if queries < keys and not bool(own[:, -1].any()):
        return False  # a cache with free slots: the queries are not its last positions
    real_keys = (visible & real_rows).any(1, keepdim=True)
    if window is not None:
        # A key that has left every window may be real or not; no row asks.
        real_keys |= ~allowed.any(0)
    return bool(((visible == (allowed & real_keys)) | ~real_rows).all())


def _layer_type(module: Any) -> str:
    types = getattr(getattr(module, "config", None), "layer_types", None)
    return types[module.layer_idx] if types else "full_attention"


def _chosen_modules(model: nn.Module, layers: Sequence[int]) -> dict[int, nn.Module]:
    found = attention_layers(model)
    if not found:
        raise invalid(
            "capture_attention",
            "model",
            "a transformers model whose attention goes through its attention interface",
            type(model).__name__,
            "Models with attention code of their own cannot be tapped.",
        )
    indices = list(found)
    chosen = {}
    for layer in layers:
        index = indices[layer] if -len(indices) <= layer < 0 else layer
        if index not in found:
            raise invalid(
                "capture_attention",
                "layers",
                f"among the attention layers {indices}",
                layer,
                "Layers count from 0; -1 is the last.",
            )
        chosen[index] = found[index]
    return chosen


def _interface(module: nn.Module) -> Any:
    """The registry in which the module's own code looks attention functions up."""
    return getattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS", None)


def _implementation(module: Any) -> str:
    return module.config._attn_implementation or "eager"


def _eager_attention(module: Any) -> Callable:
    code = sys.modules[type(module).__module__]

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise TokenWeightsError(f"{type(module).__name__} has no eager attention to pass on to")

    return getattr(code, "eager_attention_forward", missing)
