"""A stack of attention layers."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class AttentionStack:
    """The attention modules of one stack of layers, by layer index.

    Attributes:
        name: Dotted name of the module that runs the layers, within the model.
        owner: That module.
        layers: Layer index to attention module, in ascending order.
        names: Layer index to the attention module's dotted name.
    """

    name: str
    owner: nn.Module
    layers: dict[int, nn.Module]
    names: dict[int, str]
