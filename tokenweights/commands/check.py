"""Say which layers of a model can be read, from its configuration alone."""

import argparse
import re
from collections.abc import Iterator
from typing import Any

from tokenweights._errors import TokenWeightsError, invalid
from tokenweights.capture import CapturedAttention, attention_layers, capture_attention
from tokenweights.capture.layers import layer_type
from tokenweights.commands.hollow import hollow_model, run_hollow
from tokenweights.commands.models import first_line, imported_transformers, model_place
from tokenweights.commands.terminal import aligned
from tokenweights.recipes import recipe

_HEADS = ("layer", "kind", "heads", "kv heads", "attention entropy")
_RECIPE = "low2high"
# How the tap names a layer: "..., got layer 3 (`name`), REASON. HINT".
_REFUSED = re.compile(r"layer (?P<layer>-?\d+) \(`[^`]*`\), (?P<reason>.*?)\. ")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a transformers model: a directory with its config.json, a name on the Hub, or "
        "`lab`, the embedded policy of tokenweights-lab",
    )


def run(options: argparse.Namespace) -> int:
    """Prints a line for each layer, and which layer the paper's recipe takes.

    Args:
        options: What was parsed.

    Returns:
        Exit status.
    """
    model = _model(options.model)
    (taken,) = recipe(_RECIPE).on_model(model).layers  # refuses a model that cannot be tapped
    found = _found(model, options.model)
    print(f"{type(model).__name__}, from its configuration\n")
    print("\n".join(aligned([_HEADS, *_rows(model, found)])), end="\n\n")
    readable = [layer for layer, call in found.items() if not isinstance(call, str)]
    if not readable:
        hint = "Only recipes that read no attention run on it."
        raise invalid("check", "MODEL", "with a layer that can be read", "none", hint)
    near = min(readable, key=lambda layer: abs(layer - taken))
    instead = f', which is refused; {{"name": "{_RECIPE}", "layers": [{near}]}} reads layer {near}'
    print(f"{_RECIPE} reads layer {taken}" + ("" if near == taken else instead))
    return 0


def _model(name: str) -> Any:
    transformers = imported_transformers()
    transformers.logging.set_verbosity_error()
    place = model_place(name)
    try:
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
        model = hollow_model(transformers, config)
    except Exception as error:  # whatever a configuration leads its own code to
        hint = "Pass a directory with a config.json, or a name on the Hub."
        raise _refusal("to load", name, error, hint) from error
    if model is None:
        hint = "Pass one that transformers knows to generate text."
        raise invalid("check", "MODEL", "a language model", type(config).__name__, hint)
    return model


def _refusal(condition: str, name: str, error: Exception, hint: str) -> TokenWeightsError:
    return invalid("check", "MODEL", condition, f"{name}: {first_line(error)}", hint)


def _found(model: Any, name: str) -> dict[int, CapturedAttention | str]:
    """The attention call of each layer, or the reason against it."""
    layers, found = attention_layers(model), {}
    while left := [layer for layer in layers if layer not in found]:
        try:
            with capture_attention(model, left) as capture:
                run_hollow(model)
            return found | {layer: calls[0] for layer, calls in capture.calls.items()}
        except TokenWeightsError as error:
            refused = _REFUSED.search(str(error))
            if refused is None or int(refused["layer"]) not in left:
                raise
            # Layers of the same code and type are refused alike.
            first = layers[int(refused["layer"])]
            alike = [layer for layer in left if _kind(layers[layer]) == _kind(first)]
            found |= dict.fromkeys(alike, refused["reason"])
        except Exception as error:
            hint = "`inspect` loads the whole model and reads it."
            raise _refusal("to run without its weights", name, error, hint) from error
    return found


def _kind(module: Any) -> tuple[type, str]:
    return type(module), layer_type(module)


def _rows(model: Any, found: dict[int, CapturedAttention | str]) -> Iterator[tuple[str, ...]]:
    config, modules = model.config.get_text_config(decoder=True), attention_layers(model)
    types = getattr(config, "layer_types", None) or ["-"] * config.num_hidden_layers
    for layer in sorted({*range(config.num_hidden_layers), *found}):
        call = found.get(layer, "attention code of its own, or none")
        if isinstance(call, str):
            kind = layer_type(modules[layer]) if layer in modules else types[layer]
            yield str(layer), kind.removesuffix("_attention"), "-", "-", f"no: {call}"
        else:
            kind = "full" if call.window is None else f"window of {call.window}"
            yield str(layer), kind, str(call.query.shape[1]), str(call.key.shape[1]), "yes"
