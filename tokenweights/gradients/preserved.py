"""A context in which a probe may run a model and which leaves no trace."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    still holds gathered on entry are dropped.

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
    buffers = [local_shard(buffer) for buffer in model.buffers()]
    kept_buffers = [buffer.clone() for buffer in buffers]
    gradients = [parameter.grad for parameter in parameters]
    copies = [g.clone() if g is not None and in_bucket(g) else None for g in gradients]
    state, python_state = torch.get_rng_state(), random.getstate()
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    device_states = [torch.cuda.get_rng_state(device) for device in devices]

    def rewind() -> None:
        torch.set_rng_state(state)
        random.setstate(python_state)
        for device, device_state in zip(devices, device_states, strict=True):
            torch.cuda.set_rng_state(device_state, device)
        for buffer, kept in zip(buffers, kept_buffers, strict=True):
            buffer.copy_(kept)
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


def in_bucket(gradient: Tensor) -> bool:
    """Whether a gradient is a view into memory that it shares with others."""
    local = local_shard(gradient)
    return local.untyped_storage().nbytes() > local.numel() * local.element_size()
