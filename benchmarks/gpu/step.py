"""One step of the run on a strange GPU machine, in parts that are kept as they come.

`python benchmarks/gpu/step.py times --output runs/gpu` runs the parts of `times.py` that its JSON
file does not hold yet, and starts no part once its budget is spent: a second call goes on where the
first one stopped, and does nothing where all is there. What another device or commit has left is
written anew. `--toy` runs the smallest form on a CPU.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
STEPS = (
    "agreement",
    "tuning",
    "times",
    "capture",
    "probe",
    "vocabulary",
    "gradients",
    "trainer",
)


class Missing(Exception):
    """What a part raises that cannot run here, with the reason."""


@dataclass(frozen=True)
class Run:
    """Where and how large: a few tokens in the interpreter if `toy`."""

    device: torch.device
    toy: bool

    @property
    def dtype(self) -> torch.dtype:
        """Bfloat16 on a GPU."""
        return torch.float32 if self.toy else torch.bfloat16


# What a step's `parts` returns, in the order in which they matter.
Parts = dict[str, Callable[[], Any]]


def machine(run: Run) -> dict[str, Any]:
    """What a result belongs to: device, commit and versions."""
    triton = importlib.util.find_spec("triton")
    found = {
        "device": platform.machine(),
        "commit": commit(),
        "toy": run.toy,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if triton else None,
    }
    if run.device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(run.device)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(run.device)))
    return found


def commit() -> str:
    """Of the sources, with a mark where they were changed; a copy without history says so."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def take(parts: Parts, path: Path, about: dict[str, Any], budget: float) -> bool:
    """Run the parts that `path` does not hold, and write it after each.

    Parts that failed or missed something are tried again: what they missed may have been brought.

    Args:
        parts: By name; each returns what JSON can hold.
        path: What was found, by name, beside what it belongs to.
        about: If `path` belongs to anything else, it is written anew.
        budget: Seconds after which no part is started.

    Returns:
        Whether every part is there, none of them failed.
    """
    begin = time.monotonic()
    kept = json.loads(path.read_text()) if path.exists() else {}
    found = kept["parts"] if kept.get("about") == about else {}
    for name, part in parts.items():
        if "found" in found.get(name, {}):
            continue
        if time.monotonic() - begin > budget:
            print(
                f"{path.stem}: the time is up before {name}; the same command goes on", flush=True
            )
            return False
        start = time.monotonic()
        try:
            found[name] = {"found": part()}
        except Missing as reason:
            found[name] = {"missing": str(reason)}
        except Exception as error:  # the others still run; the next call tries this one again
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:2000]}"}
        found[name]["seconds"] = round(time.monotonic() - start, 2)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps({"about": about, "parts": found}, indent=1) + "\n")
        partial.replace(path)
        print(f"{path.stem}: {name}: {json.dumps(found[name])[:300]}", flush=True)
    return not any("failed" in found[name] for name in parts)


def kernels_run(run: Run) -> None:
    """Refuse where Triton's kernels run neither on a device nor in the interpreter."""
    if run.device.type == "cuda":
        return
    from tokenweights import attention_entropy

    query = torch.ones(1, 1, 2, 16)
    try:
        attention_entropy(query, query, backend="triton")
    except Exception as error:  # the interpreter of older tritons fails with newer numpys
        reason = f"{type(error).__name__}: {str(error).splitlines()[-1][:200]}"
        raise Missing(f"needs a device: {reason}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=400, help="no part starts after these")
    parser.add_argument("--toy", action="store_true", help="the smallest form, on a CPU")
    arguments = parser.parse_args()
    if arguments.toy:
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here; --toy runs the smallest form on a CPU")
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks/kernels"), str(ROOT)]
    run = Run(torch.device("cpu" if arguments.toy else "cuda"), arguments.toy)
    # A module of this name may lie in another folder as well.
    name = f"gpu_{arguments.step}"
    path = Path(__file__).with_name(f"{arguments.step}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["step"] = sys.modules["__main__"]
    spec.loader.exec_module(module)
    where = arguments.output / f"{arguments.step}.json"
    done = take(module.parts(run), where, machine(run), arguments.seconds)
    raise SystemExit(0 if done else 1)


if __name__ == "__main__":
    main()
