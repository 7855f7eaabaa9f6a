"""Runs functions on real gloo ranks, each a process of its own.

A rank that fails, or one that waits for ever, fails the test and ends the pool.
"""

import io
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 300.0  # bound on a call, and on the imports before it: long on the busiest machine


class Ranks:
    """A pool of gloo ranks that live until the context ends, so that many calls cost one start."""

    def __init__(self, size: int, seconds: float = SECONDS):
        self.size, self.seconds = size, seconds
        self._start()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = _context()
        self._pipes, self._processes = [], []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.size, self._folder.name, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers(SECONDS)

    def _stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results of `function(rank, size, *arguments)` on every rank, in rank order.

        Raises:
            AssertionError: If a rank raised, ended, or did not answer in time.
        """
        task = _packed((function, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(task)
        try:
            self._answers(SECONDS)
            return self._answers(self.seconds)
        except AssertionError:
            self._stop()  # others may wait in a collective, for ever
            self._start()
            raise

    def _answers(self, seconds: float) -> list[Any]:
        answers: dict[Connection, Any] = {}
        waiting, end = list(self._pipes), time.monotonic() + seconds
        while waiting:
            patience = max(0.0, end - time.monotonic())
            ready: list[Any] = wait(waiting, patience)
            if not ready:
                ranks = [self._pipes.index(pipe) for pipe in waiting]
                raise AssertionError(f"no answer from ranks {ranks} in {seconds:g} s")
            for pipe in ready:
                try:
                    failed, answers[pipe] = _unpacked(pipe.recv_bytes())
                except EOFError:
                    failed, answers[pipe] = True, "its process ended"
                waiting.remove(pipe)
                if failed:
                    raise AssertionError(f"rank {self._pipes.index(pipe)} failed:\n{answers[pipe]}")
        return [answers[pipe] for pipe in self._pipes]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()


def on_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """Results of `function(rank, size, *arguments)` on `size` fresh ranks, in rank order."""
    with Ranks(size) as ranks:
        return ranks(function, *arguments)


def _context() -> Any:
    """How ranks start: forked by a server that has made the imports once, where there is one."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tokenweights", "torch.distributed", "hypothesis", "pytest"])
    return context


def _serve(rank: int, size: int, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = f"file://{Path(folder)}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    pipe.send_bytes(_packed((False, "ready")))
    while True:
        function, arguments = _unpacked(pipe.recv_bytes())
        pipe.send_bytes(_packed((False, "begun")))
        try:
            answer = (False, function(rank, size, *arguments))
        except Exception:
            answer = (True, traceback.format_exc())
        pipe.send_bytes(_packed(answer))


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
