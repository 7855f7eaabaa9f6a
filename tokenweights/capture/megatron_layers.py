"""The attention layers of a megatron-core model, of which a pipeline stage has some.

Classes are known by their names: nothing here imports megatron.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenweights._errors import invalid
from tokenweights.capture.stack import AttentionStack

_BLOCK = "megatron.core.transformer.transformer_block.TransformerBlock"


@dataclass(frozen=True)
class MegatronLayers:
    """The attention layers of a megatron-core model that this rank holds.

    Attributes:
        depth: Number of layers over all pipeline stages.
        stacks: One for each chunk of this rank's pipeline stage, layers by their global index.
    """

    depth: int
    stacks: list[AttentionStack]


def megatron_layers(model: nn.Module) -> MegatronLayers | None:
    """The attention layers of a megatron-core model; None for any other.

    Several chunks of a virtual pipeline come as one `torch.nn.ModuleList`.
    """
    blocks = [(name, module) for name, module in model.named_modules() if is_a(module, _BLOCK)]
    if not blocks:
        return None
    stacks, known = [], {}
    for name, block in blocks:
        stack = AttentionStack(name, block, {}, {})
        layers: Any = block.layers
        for number, layer in enumerate(layers):
            attention: Any = getattr(layer, "self_attention", None)
            if not hasattr(attention, "core_attention"):
                continue
            index = layer.layer_number - 1
            if index in known:
                raise invalid(
                    "attention_layers",
                    "model",
                    "with one stack of attention layers",
                    sorted({known[index], name}),
                    f"Pass one of them: `model.get_submodule({name!r})`.",
                )
            known[index] = name
            stack.layers[index] = attention
            stack.names[index] = f"{name}.layers.{number}.self_attention"
        stacks.append(stack)
    owner: Any = stacks[0].owner
    return MegatronLayers(owner.config.num_layers, stacks)


def asked_layers(found: MegatronLayers, layers: Iterable[int]) -> list[int]:
    """Indices from 0 of the layers asked for, on whichever pipeline stage they are."""
    chosen = []
    for layer in layers:
        index = layer + found.depth if layer < 0 else layer
        if not 0 <= index < found.depth:
            raise invalid(
                "capture_attention",
                "layers",
                f"among the {found.depth} layers of all pipeline stages",
                layer,
                "Layers count from 0; -1 is the last.",
            )
        chosen.append(index)
    return list(dict.fromkeys(chosen))


def is_a(module: Any, known: str) -> bool:
    """Whether a module is of a class of that full name, or of a subclass."""
    return any(_full_name(cls) == known for cls in type(module).__mro__)


def runs(module: Any, known: str) -> bool:
    """Whether the code of a class is what runs in the module's forward, also in a subclass."""
    owners = (cls for cls in type(module).__mro__ if "forward" in vars(cls))
    # A base class of megatron may hold the forward of the known one.
    owner = next(owners)
    mro = [_full_name(cls) for cls in type(module).__mro__]
    return known in mro and mro.index(_full_name(owner)) >= mro.index(known)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
