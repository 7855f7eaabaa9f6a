"""The attention layers of a transformers model."""

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from tokenweights._errors import invalid
from tokenweights._typing import typed


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
        if isinstance(layer, int) and hasattr(module, "is_causal") and interface(module):
            found.setdefault(layer, module)
    return dict(sorted(found.items()))


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


def chosen_layers(model: nn.Module, layers: Sequence[int]) -> dict[int, nn.Module]:
    """The attention modules of the layers asked for, by index from 0."""
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


def interface(module: nn.Module) -> Any:
    """The registry in which the module's own code looks attention functions up."""
    return getattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS", None)


def implementation(module: Any) -> str:
    """The key of the module's attention function in that registry."""
    return module.config._attn_implementation or "eager"


def visible_window(module: Any, options: dict) -> int | None:
    """The sliding window of a call in keys, the query included, or None."""
    window = options.get("sliding_window")
    if window is None and layer_type(module) == "sliding_attention":
        window = getattr(module, "sliding_window", None) or module.config.sliding_window
    return window


def layer_type(module: Any) -> str:
    """How a layer attends, in the words of transformers."""
    types = getattr(getattr(module, "config", None), "layer_types", None)
    return types[module.layer_idx] if types else "full_attention"
