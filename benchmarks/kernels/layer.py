"""The layer that is measured: one causal sequence with grouped-query attention."""

import argparse
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layer:
    """Sizes, type and place of queries and keys."""

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys as a projection leaves them: scores of a few units."""
        generator = torch.Generator(self.device).manual_seed(0)
        shapes = [(1, count, self.tokens, self.dim) for count in (self.heads, self.kv_heads)]
        drawn = [torch.randn(s, generator=generator, device=self.device) for s in shapes]
        return drawn[0].to(self.dtype), drawn[1].to(self.dtype)


def layers(arguments: argparse.Namespace) -> list[Layer]:
    """One layer per length; that of an 8B model on a GPU, smaller on a CPU."""
    gpu = arguments.device == "cuda"
    tokens = arguments.tokens or ([2**power for power in range(10, 18)] if gpu else [1024, 4096])
    if arguments.toy and not arguments.tokens:
        tokens = [48, 96]
    heads, kv_heads, dim = (32, 8, 128) if gpu else (16, 16, 64)
    if arguments.toy:
        heads, kv_heads, dim = 4, 2, 64
    return [
        Layer(
            count,
            arguments.heads or heads,
            arguments.kv_heads or kv_heads,
            arguments.dim or dim,
            torch.bfloat16 if gpu else torch.float32,
            torch.device(arguments.device),
        )
        for count in tokens
    ]
