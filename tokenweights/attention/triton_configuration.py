"""Tile sizes of the Triton kernels, and what they refuse; triton itself is not imported here."""

import importlib.util
import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LARGEST_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A row of this many weights stays in the registers of a program; longer ones are read in pieces.
LARGEST_BLOCK = 16384


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a product, and the warps and load stages that work on it.

    Weights alone may have keys `shared`, by the query heads that have them, once loaded, and
    `overlapped` heads: exponentials of one run while the product of the next does.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    shared: bool = False
    overlapped: bool = False

    def __str__(self) -> str:
        form = ", keys shared" * self.shared + ", overlapped" * self.overlapped
        return f"{self.rows}x{self.keys} {self.warps}w s{self.stages}{form}"


@dataclass(frozen=True)
class Selection:
    """Rows, columns and warps of a program that selects, and pieces of columns per row."""

    rows: int
    block: int
    warps: int
    pieces: int


@dataclass(frozen=True)
class Configuration:
    """How the kernels are compiled.

    Attributes:
        weights: Tiles of the head-averaged weights, for the entropy alone.
        sums: The same where more is summed or weights are written to a workspace.
        denominators: Tiles of the log-sum-exp.
        columns: Tiles of attention received; None for what `column_tiles` makes of the others.
        descriptors: Load tiles by tensor descriptors (TMA) instead of pointers.
        largest_block: Most weights of a row that a selecting program holds.
        selected: Weights that a selecting program holds where rows are shorter.
    """

    weights: Tiles
    sums: Tiles
    denominators: Tiles
    columns: Tiles | None = None
    descriptors: bool = False
    largest_block: int = LARGEST_BLOCK
    selected: int = 4096

    def selection(self, width: int, rows: int) -> Selection:
        """How rows of `width` weights, `rows` of them in a block, are selected from."""
        block = min(_power_of_two(width), self.largest_block)
        together = min(max(self.selected // block, 1), _power_of_two(rows))
        # The numbers of warps at which no architecture spills.
        warps = {8192: 4, 16384: 16}.get(together * block, 8)
        return Selection(together, block, warps, -(-width // block))


def block_dim(dim: int) -> int:
    """The width of a tile for heads of this width: a power of two, the rest being zeros."""
    return max(_power_of_two(dim), 16)


def shipped_configuration(query: Tensor, key: Tensor, *, softcap: bool = False) -> Configuration:
    """The configuration for these tensors' device, type and head dimension, and these logits."""
    if query.device.type == "cpu":
        return INTERPRETER
    major, _ = torch.cuda.get_device_capability(query.device)
    describable = _describable(query) and _describable(key)
    block = block_dim(query.shape[-1])
    size = query.element_size()
    return shipped(major, block, size, describable=describable, softcap=softcap)


def shipped(
    major: int, block: int, element_bytes: int, *, describable: bool = True, softcap: bool = False
) -> Configuration:
    """The configuration for a major compute capability, tile width and bytes per number.

    All of them compile without local memory and within the shared memory of their devices, as the
    tests read from the binaries of Triton 3.6, 3.7 and 3.9.
    """
    if element_bytes == 4:
        # Exact float32 products run outside the tensor cores, where small tiles are enough.
        few, products = Tiles(32, 16, 4, 1), Tiles(32, 32, 8, 1)
        return Configuration(products, products, few)
    wide = block > 128
    long, square = Tiles(64, 128, 4, 2), Tiles(64, 64, 8, 2)
    columns = Tiles(64, 32, 4, 2) if major == 10 else None  # more keys spill
    if major >= 9 and describable and not wide:
        sums = Tiles(64, 64, 4, 2, shared=True) if major == 9 else Tiles(64, 64, 8, 3)
        weights = replace(long, shared=True)
        if major == 10:
            # A second stage spills in Triton 3.9, 128 keys with a softcap in 3.6.
            weights = Tiles(64, 64, 4, 2, shared=True) if softcap else replace(weights, stages=1)
        return Configuration(weights, sums, long, descriptors=True, columns=columns)
    if major == 10:
        # With a softcap, Triton 3.7 spills a second stage of pointers, and 4 warps of wide heads.
        sums = square if describable else Tiles(64, 32, 8, 1 if softcap and not wide else 2)
        few = Tiles(64, 64, 4, 2) if wide and not softcap else square
        weights = square if wide or describable else Tiles(64, 64, 4, 1)
        return Configuration(weights, sums, few, descriptors=describable, columns=columns)
    large = square if wide and not (major == 9 and describable) else Tiles(128, 64, 8, 2)
    sums = large if wide or major == 9 else replace(square, shared=True)
    return Configuration(large, sums, large, descriptors=major == 9 and describable)


# Small programs are slow to interpret, whatever the size of their tiles.
INTERPRETER = Configuration(
    Tiles(32, 64, 1, 1), Tiles(32, 64, 1, 1), Tiles(32, 64, 1, 1), largest_block=128
)


def triton_refusal(query: Tensor, key: Tensor) -> str | None:
    """Why the Triton kernels cannot serve these tensors; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if query.dtype not in DTYPES or key.dtype != query.dtype:
        return f"inputs are {query.dtype} and {key.dtype}, not both float32, float16 or bfloat16"
    if query.shape[-1] > LARGEST_DIM:
        return f"the head dimension {query.shape[-1]} is above {LARGEST_DIM}"
    if query.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "the tensors are on the CPU and TRITON_INTERPRET=1 is not set"
    if query.device.type != "cuda" or torch.version.hip is not None:
        return f"the device {query.device} is not an NVIDIA GPU"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "the GPU has a compute capability below 8.0"
    return None


def _describable(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can address it: 16-byte rows with a dense last axis."""
    strides = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    aligned = tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides)
    return aligned and tensor.stride(-1) == 1


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
