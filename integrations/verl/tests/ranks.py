"""Runs a script on several ranks, each a process of its own, and returns what each one saved."""

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from cpu_platform import ENVIRONMENT, IMPORTS
from tokenweights_lab.forking import python_with

HERE = Path(__file__).parent


def placed(rank, ranks):
    """What VeRL's workers read of their place; the process group meets over a file."""
    place = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    return {name: str(value) for name, value in place.items()}


def saved_by_ranks(script, ranks, folder, *arguments, timeout=900):
    python = python_with(*IMPORTS)
    processes = [
        subprocess.Popen(
            [python, str(HERE / script), str(rank), str(ranks), str(folder), *arguments],
            env={**os.environ, **ENVIRONMENT, **placed(rank, ranks)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-6000:]
    return [torch.load(f"{folder}/rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def results_by_case(script, runs, new_folder):
    """A function from a run and one of its cases to what each rank saved; a run runs once."""

    @cache
    def of(run):
        ranks, cases = runs[run]
        try:
            return saved_by_ranks(script, ranks, new_folder(run), *cases)
        except AssertionError as error:
            return error  # a run that failed is not repeated

    def result(run, case):
        if isinstance(of(run), AssertionError):
            pytest.fail(str(of(run)))
        return [saved[case] for saved in of(run)]

    return result
