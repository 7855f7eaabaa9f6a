"""Runs a function on real gloo ranks, each a process of its own."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """Results of `function(rank, size, *arguments)` on every rank, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank, args=(size, folder, function, arguments), nprocs=size, start_method="spawn"
        )
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]


def _rank(rank: int, size: int, folder: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    torch.save(function(rank, size, *arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
