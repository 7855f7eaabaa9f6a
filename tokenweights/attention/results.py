"""Assembly: pieces of heads, rows and sequences into tensors `batch heads query`."""

import torch
from torch import Tensor

from tokenweights.attention.layout import Slots
from tokenweights.attention.statistics import Heads, Request


def empty_results(
    request: Request,
    shape: tuple[int, int, int],
    like: Tensor,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Zeros of shape `batch heads query` per kind: the value of a query nobody writes."""
    results = {}
    for kind in request.kinds:
        if kind == "support_size":
            mass = len(request.support_mass)
            results[kind] = torch.zeros(*shape, mass, dtype=torch.int64, device=like.device)
        else:
            results[kind] = torch.zeros(shape, dtype=dtype, device=like.device)
    return results


def write_results(results: dict[str, Tensor], found: dict[str, Tensor], slots: Slots) -> None:
    """Put the values of one sequence where its queries lie in the batch."""
    for kind, value in found.items():
        results[kind][slots.row][:, slots.query] = value.to(results[kind].dtype)


def over_heads(results: dict[str, Tensor], heads: Heads) -> dict[str, Tensor]:
    """The head axis dropped, averaged or kept."""
    if heads == "none":
        return results
    return {
        kind: value.mean(1) if heads == "mean_entropy" else value[:, 0]
        for kind, value in results.items()
    }


def joined(parts: list[dict[str, Tensor]], dim: int) -> dict[str, Tensor]:
    """Results of consecutive heads (`dim` 0) or rows (`dim` 1)."""
    return {kind: torch.cat([part[kind] for part in parts], dim) for kind in parts[0]}
