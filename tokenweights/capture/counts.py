"""Counts how often a forward pass reaches each tapped layer: it has to be once."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tokenweights._errors import invalid
from tokenweights.capture.layers import AttentionStack


@contextmanager
def counted_calls(stack: AttentionStack, layers: Iterable[int]) -> Iterator[Counter[int]]:
    """A context in which every forward of the stack ends with a look at the counts of its layers.

    Whoever taps the layers counts their calls. Without this look a layer that goes another way
    would leave nothing behind, and one that attends twice would leave a part of its attention.
    """
    counts: Counter[int] = Counter()
    owner = stack.name or type(stack.owner).__name__

    def begin(*_: object) -> None:
        if not recomputing():
            counts.clear()

    def end(*_: object) -> None:
        for layer in layers:
            if counts[layer] != 1 and not recomputing():
                raise invalid(
                    "capture_attention",
                    "layers",
                    f"that call their attention function once in a forward of `{owner}`",
                    f"layer {layer} (`{stack.names[layer]}`), {counts[layer]} calls of it",
                    "What several calls make together, or none, is not one attention distribution: "
                    "probe another layer.",
                )

    untraced: Callable[..., Any] = torch.compiler.disable
    hooks = [
        stack.owner.register_forward_pre_hook(untraced(begin)),
        stack.owner.register_forward_hook(untraced(end)),
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def recomputing() -> bool:
    """Whether a backward pass runs: gradient checkpointing repeats a forward there."""
    return torch._C._current_graph_task_id() != -1
