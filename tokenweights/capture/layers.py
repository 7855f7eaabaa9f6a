"""The attention layers of a transformers model: which stack they belong to, and how they attend."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.capture.megatron_layers import megatron_layers
from tokenweights.capture.stack import AttentionStack as AttentionStack


@typed
def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The attention modules of a model whose query and key can be tapped, by layer index.

    Of a model of several stacks these are the layers of the one that generates text: the language
    model beside a vision tower, the decoder beside an encoder.

    Args:
        model: A transformers model, also inside DDP, FSDP or PEFT wrappers; or one of
            megatron-core, of which this pipeline stage has some of the layers.

    Returns:
        Layer index to module, in ascending order; empty if the model has no such module.

    Raises:
        TokenWeightsError: If several stacks could be meant. Pass the submodule that is.
    """
    spread = megatron_layers(model)
    if spread is not None:
        return {layer: module for stack in spread.stacks for layer, module in stack.layers.items()}
    stack = attention_stack(model)
    return {} if stack is None else stack.layers


def attention_stack(model: nn.Module) -> AttentionStack | None:
    """The stack of layers whose attention is meant by a layer index; None if there is none."""
    stacks = _stacks(model)
    # Encoders and towers attend both ways; what generates does not.
    meant = [stack for stack in stacks if _causal(stack)] or stacks
    if len(meant) > 1:
        decoder = _decoder(model)
        inside = set() if decoder is None else set(decoder.modules())
        meant = [stack for stack in meant if inside.issuperset(stack.layers.values())] or meant
    if len(meant) > 1:
        raise invalid(
            "attention_layers",
            "model",
            "with one stack of causal attention layers",
            [stack.name for stack in meant],
            f"Pass one of them: `model.get_submodule({meant[0].name!r})`.",
        )
    return meant[0] if meant else None


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


def chosen_layers(stack: AttentionStack, layers: Iterable[int]) -> dict[int, nn.Module]:
    """The attention modules of the layers asked for, by index from 0."""
    indices = list(stack.layers)
    chosen = {}
    for layer in layers:
        index = indices[layer] if -len(indices) <= layer < 0 else layer
        if index not in stack.layers:
            raise invalid(
                "capture_attention",
                "layers",
                f"among the attention layers {indices}",
                layer,
                "Layers count from 0; -1 is the last.",
            )
        chosen[index] = stack.layers[index]
    return chosen


def learned_positions(model: nn.Module) -> str | None:
    """Name of the embedding of absolute positions beside the attention layers; None if none is.

    Such a model needs position ids where rows have padding on the left. Rotary positions are
    relative, and embeddings that are given the attention mask count the padding themselves.
    """
    stack = attention_stack(model)
    for name, module in () if stack is None else stack.owner.named_modules():
        last = name.rpartition(".")[2]
        counts_itself = "attention_mask" in inspect.signature(type(module).forward).parameters
        if isinstance(module, nn.Embedding) and not counts_itself:
            if last == "wpe" or "position" in last:
                return name
    return None


def registry(module: Any) -> Any:
    """Where the module's own code looks attention functions up; None if it does not."""
    # The code of a class may stand in another file than the class: in that of its base, or of a
    # library that has replaced its `forward`.
    code = inspect.unwrap(type(module).forward)
    return getattr(code, "__globals__", {}).get("ALL_ATTENTION_FUNCTIONS")


def implementation(module: Any) -> str:
    """The key of the module's attention function in that registry."""
    return module.config._attn_implementation or "eager"


def window_hint(module: Any, options: dict) -> int | None:
    """The sliding window that a call or its layer names, in keys, the query included, or None."""
    window = options.get("sliding_window")
    if window is None and layer_type(module) == "sliding_attention":
        window = getattr(module, "sliding_window", None) or module.config.sliding_window
    return window


def layer_type(module: Any) -> str:
    """How a layer attends, in the words of transformers."""
    types = getattr(getattr(module, "config", None), "layer_types", None)
    return types[module.layer_idx] if types else "full_attention"


def _stacks(model: nn.Module) -> list[AttentionStack]:
    """All stacks: modules whose names agree up to the first number share one."""
    stacks: dict[str, AttentionStack] = {}
    for name, module in _tappable(model):
        owner = _owner(name)
        if owner not in stacks:
            stacks[owner] = AttentionStack(owner, model.get_submodule(owner), {}, {})
        stack, layer = stacks[owner], module.layer_idx
        # A decoder's layer attends to itself and then to an encoder: the first is causal.
        known = stack.layers.get(layer)
        if known is None or (module.is_causal and not known.is_causal):
            stack.layers[layer], stack.names[layer] = module, name
    return [
        AttentionStack(s.name, s.owner, dict(sorted(s.layers.items())), s.names)
        for s in stacks.values()
    ]


def _tappable(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if (
            isinstance(getattr(module, "layer_idx", None), int)
            and hasattr(module, "is_causal")
            and registry(module) is not None
        ):
            yield name, module


def _owner(name: str) -> str:
    """Name of the module that runs a stack: `model` for `model.layers.3.self_attn`."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    # The list of layers stands before the number, what owns the list before that.
    return ".".join(parts[: max(0, numbers[0] - 1)] if numbers else parts[:-1])


def _causal(stack: AttentionStack) -> bool:
    return any(bool(module.is_causal) for module in stack.layers.values())


def _decoder(model: nn.Module) -> nn.Module | None:
    """What the one transformers model inside `model` calls its decoder; None of several models."""
    found = list(_models(model))
    decoder: Any = found[0].get_decoder() if len(found) == 1 else None
    return decoder if isinstance(decoder, nn.Module) else None


def _models(module: nn.Module) -> Iterator[Any]:
    """The transformers models in a module, without those that are parts of another."""
    if callable(getattr(module, "get_decoder", None)):
        yield module
    else:
        for part in module.children():
            yield from _models(part)
