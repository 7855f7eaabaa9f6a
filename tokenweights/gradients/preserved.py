"""A context in which a probe may run a model and which leaves no trace."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenweights._errors import invalid
from tokenweights.gradients.shards import local_shard


@contextmanager
def preserved(
    function: str, model: nn.Module, *, hooks_allowed: bool = False
) -> Iterator[Callable[[], None]]:
    """Gradients, buffers and random state are on exit, bit for bit, what they were on entry.

    Inside, every `.grad` is None. Gradients that were there are set aside, and copied only where a
    wrapper keeps them in a bucket that the next backward pass overwrites. Parameters that FSDP
    still holds gathered on entry are dropped. Random state is that of torch on the CPU and on the
    GPUs that hold parameters, of Python's `random`, and of NumPy's global generator where NumPy is
    loaded; generators of the caller's own are not known here.

    Args:
        function: Name of the public function, for errors.
        model: The module that runs inside.
        hooks_allowed: Whether parameters may have post-accumulate-gradient hooks, as an engine's
            have, because its backward pass is the caller's.

    Yields:
        A function that rewinds buffers and random state to the entry, and drops parameters that
        FSDP still holds gathered. Each forward pass after it sees the same noise.

    Raises:
        TokenWeightsError: If a parameter steps its optimizer inside the backward pass.
    """
    parameters = list(model.parameters())
    if not hooks_allowed and any(
        getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters
    ):
        raise invalid(
            function,
            "model",
            "without post-accumulate-gradient hooks",
            "a parameter that has one",
            "An optimizer that steps in the backward pass would step during the probe: remove it.",
        )
    rewind_buffers, rewind_random = _buffers(model), _random(parameters)
    gradients = [parameter.grad for parameter in parameters]
    copies = [g.clone() if g is not None and in_bucket(g) else None for g in gradients]

    def rewind() -> None:
        rewind_random()
        rewind_buffers()
        for module in model.modules():
            reshard = getattr(module, "reshard", None)
            if callable(reshard) and hasattr(module, "unshard"):
                reshard()

    try:
        for parameter in parameters:
            parameter.grad = None
        rewind()
        yield rewind
    finally:
        for parameter, gradient, copy in zip(parameters, gradients, copies, strict=True):
            if gradient is not None and copy is not None:
                gradient.copy_(copy)
            parameter.grad = gradient
        rewind()


def _buffers(model: nn.Module) -> Callable[[], None]:
    """Puts every buffer back into its slot, and its values back into it."""
    modules = [(m, dict(m._buffers), dict(vars(m))) for m in model.modules()]
    values = [(buffer, local_shard(buffer).clone()) for buffer in model.buffers()]

    def rewind() -> None:
        for module, slots, attributes in modules:
            now = module._buffers
            if now.keys() != slots.keys() or any(now[name] is not slots[name] for name in now):
                # A module that replaces a buffer keeps books on it, as a rotary embedding does on
                # the length that its frequencies are for: the two go back together.
                now.clear()
                now.update(slots)
                vars(module).clear()
                vars(module).update(attributes)
        for buffer, kept in values:
            local_shard(buffer).copy_(kept)

    return rewind


def _random(parameters: list[nn.Parameter]) -> Callable[[], None]:
    """Puts the global random generators back."""
    state, python_state = torch.get_rng_state(), random.getstate()
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    device_states = [torch.cuda.get_rng_state(device) for device in devices]
    numpy: Any = sys.modules.get("numpy")  # no dependency, but a model may draw from it
    numpy_state = None if numpy is None else numpy.random.get_state()

    def rewind() -> None:
        torch.set_rng_state(state)
        random.setstate(python_state)
        for device, device_state in zip(devices, device_states, strict=True):
            torch.cuda.set_rng_state(device_state, device)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

    return rewind


def in_bucket(gradient: Tensor) -> bool:
    """Whether a gradient is a view into memory that it shares with others."""
    local = local_shard(gradient)
    if local.layout != torch.strided:
        return False
    return local.untyped_storage().nbytes() > local.numel() * local.element_size()
