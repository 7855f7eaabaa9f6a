"""Imports point down the floors of the house, and heavy packages stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "tokenweights"

FLOORS = [
    {"_typing", "_hints", "_errors", "_numbers"},
    {"masked", "schedules", "_random"},
    {"distributed"},
    {"scopes"},
    {"attention", "signals", "partition", "selection", "scaling", "weights", "losses"}
    | {"likelihood"},
    {"gradients", "diagnostics", "rewards"},
    {"capture"},
    {"recipes"},
    {"report"},
    {"commands", "adapters"},
    {"__main__"},
]
HEAVY = {
    "triton": {"attention"},
    "matplotlib": {"report", "commands"},
    "transformers": {"capture", "commands"},
    "tqdm": {"commands"},
}
SMALL = {"torch", "einops", "jaxtyping", "beartype"}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module or "")
    return names


SOURCES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = room(path)
    floor = next(level for level, rooms in enumerate(FLOORS) if own in rooms)
    below = set().union(*FLOORS[: floor + 1])
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "tokenweights":
            whole = own == "__main__" and not rest  # the roof stands on all of it
            assert whole or (rest and rest[0] in below), f"{own} may not import {name}"
        elif package in HEAVY:
            assert own in HEAVY[package], f"only {HEAVY[package]} may import {package}"
        else:
            assert package in SMALL | sys.stdlib_module_names, f"{name} is not a dependency"


def test_importing_the_library_imports_nothing_heavy():
    code = "import sys, tokenweights; print(*sorted(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in shown.stdout.split()}
    assert "torch" in loaded
    assert not loaded & {"triton", "transformers", "matplotlib", "trl", "verl", "openrlhf"}


def test_the_command_line_starts_without_its_heavy_packages():
    code = "import sys, tokenweights.__main__; print(*sorted(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in shown.stdout.split()}
    assert not loaded & {"triton", "transformers", "matplotlib"}
