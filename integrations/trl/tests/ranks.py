"""A script of the tests on the ranks of torchrun, or alone: how it is run, and what it needs."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tokenweights_lab.forking import python_with

TESTS = Path(__file__).parent
# What takes long to import in every process of a test.
IMPORTS = ("trl.trainer.grpo_trainer", "peft", "datasets", "tokenweights.report")


def launcher(ranks: int) -> tuple[list[str], dict[str, str]]:
    """How a command on the ranks of torchrun, or alone, begins, and its environment."""
    python = python_with(*IMPORTS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [python, *(torchrun if ranks > 1 else [])], os.environ | {"PYTHON_EXEC": python}


def outcome(script: str, ranks: int, path: Path, asked: Any, **environment: str) -> Any:
    """What the script writes to a JSON file, given the file and JSON of what is asked for."""
    command, inherited = launcher(ranks)
    paths = [str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [*command, str(TESTS / script), str(path), json.dumps(asked)],
        env=inherited | environment | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


def repeatable(batch_size: int) -> dict[str, Any]:
    """Arguments under which any number of ranks makes the same rollout batch, greedily."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "shuffle_dataset": False,
        "generation_kwargs": {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        },
        "per_device_train_batch_size": batch_size // ranks,
        "ddp_backend": "gloo" if ranks > 1 else None,
    }


def finish(path: str, outcome: Any) -> None:
    """Ends a rank of the script; the first writes down what came out."""
    if os.environ.get("RANK", "0") == "0":
        Path(path).write_text(json.dumps(outcome))
    time.sleep(1.0)  # see `tokenweights_trl.train.main`
    PartialState().destroy_process_group()
