"""Models without weights: all that they multiply by is zero, and takes no memory.

Masks, positions and the way through the layers are those of the real model, whatever its size, so
that what its attention functions are called with can be seen.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_PRODUCTS = {
    F.linear,
    torch.addmm,
    torch.bmm,
    torch.einsum,
    torch.matmul,
    Tensor.__matmul__,
    Tensor.bmm,
    Tensor.matmul,
}
_TOKENS = 6


class _ZeroProducts(TorchFunctionMode):
    """A context in which products of matrices are zeros of the right shape, without any work."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        shapes = [value.to("meta") if isinstance(value, Tensor) else value for value in args]
        return torch.zeros_like(func(*shapes, **(kwargs or {})), device="cpu")


def hollow_model(transformers: ModuleType, config: Any) -> Any:
    """The language model of a configuration, with weights of zero; None if there is none."""
    for kind in ("CausalLM", "ImageTextToText", "Seq2SeqLM"):
        auto = getattr(transformers, f"AutoModelFor{kind}")
        if type(config) in auto._model_mapping:
            break
    else:
        return None
    with torch.device("meta"):
        # A mask is a tensor under eager attention, and shows all that a layer sees.
        model = auto.from_config(
            config,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            trust_remote_code=False,
        )
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return model.eval()


def run_hollow(model: Any) -> None:
    """One forward pass over a few tokens."""
    ids = torch.arange(3, 3 + _TOKENS)[None]  # lower ones may mean padding
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad(), _ZeroProducts():
        model(**inputs)
