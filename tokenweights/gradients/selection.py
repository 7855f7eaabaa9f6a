"""Which parameters a probe differentiates by: all, those of some layers, or those of some names."""

import re
from collections.abc import Sequence

from torch import Tensor, nn

from tokenweights._errors import invalid
from tokenweights._typing import typed

# What models call the list of their blocks: Llama and Qwen, GPT-2, BERT, GPT-NeoX and others.
LAYER = re.compile(r"(?:^|\.)(?:layers|h|layer|blocks|block)\.(\d+)\.")


@typed
def selected_parameters(
    model: nn.Module, *, pattern: str | None = None, layers: Sequence[int] | None = None
) -> dict[str, Tensor]:
    r"""The parameters of a model that need a gradient, by name and by layer.

    Args:
        model: Any module, wrapped or not.
        pattern: Regular expression that is searched in the name; None keeps every name.
        layers: Numbers of the layers to keep, from 0; None keeps all, and what belongs to no layer.

    Returns:
        Parameters by name, in the model's order, each once.

    Raises:
        TokenWeightsError: If `pattern` is no regular expression, the model has no layer of a given
            number, or nothing is left.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> list(selected_parameters(model, pattern="weight"))
        ['0.weight', '1.weight']
    """
    try:
        expression = re.compile(pattern or "")
    except re.error as error:
        hint = "Escape what stands for itself: `re.escape` does."
        got = f"{pattern!r} ({error})"
        raise invalid(
            "selected_parameters", "pattern", "a regular expression", got, hint
        ) from error
    numbers = {name: _layer(name) for name, _ in model.named_parameters()}
    known = sorted({number for number in numbers.values() if number is not None})
    if layers is not None and not set(layers) <= set(known):
        hint = "Layers count from 0."
        raise invalid("selected_parameters", "layers", f"among {known}", list(layers), hint)
    kept: dict[str, Tensor] = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and expression.search(name)
        and (layers is None or numbers[name] in layers)
    }
    if not kept:
        raise invalid(
            "selected_parameters",
            "pattern, layers",
            "matched by a parameter that requires a gradient",
            (pattern, layers),
            f"The first names are {[name for name, _ in model.named_parameters()][:3]}.",
        )
    return kept


def _layer(name: str) -> int | None:
    found = LAYER.search(name)
    return None if found is None else int(found[1])
