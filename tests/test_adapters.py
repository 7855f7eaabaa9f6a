"""The three adapters are alike in shape, and thin."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "integrations"
ADAPTERS = ("trl", "verl", "openrlhf")
# What all adapters have under the same names, so that whoever has read one can read all.
FILES = {"__init__.py", "config.py", "py.typed", "scores.py", "train.py", "trainer.py"}
FOLDERS = {"LICENSE", "README.md", "examples", "pyproject.toml", "src", "tests"}
# Held to a size: what an adapter needs beyond it belongs into the core.
THIN, MOST_LINES = ("verl", "openrlhf"), 400


def source(adapter: str) -> Path:
    return ROOT / adapter / "src" / f"tokenweights_{adapter}"


def code_lines(path: Path) -> int:
    """Lines that are neither blank nor a comment nor part of a docstring."""
    text = path.read_text()
    counted = {
        number
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            first = node.body[0]
            counted -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(counted)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_alike(adapter):
    assert {path.name for path in source(adapter).iterdir()} >= FILES
    assert {path.name for path in (ROOT / adapter).iterdir()} >= FOLDERS


@pytest.mark.parametrize("adapter", THIN)
def test_adapters_are_thin(adapter):
    lines = sum(code_lines(path) for path in source(adapter).rglob("*.py"))
    assert lines <= MOST_LINES, f"{lines} lines of code"


def features(adapter: str) -> list[list[str]]:
    """Rows of the table of features in an adapter's README: feature, state, tests."""
    text = (ROOT / adapter / "README.md").read_text().split("\n## Features\n")[1]
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_guide_lists_what_was_not_tried_with_trl():
    text = (ROOT.parent / "docs" / "guides" / "trl.md").read_text().split("\n## Not tried\n")[1]
    _, *listed = re.findall(r"^\| (.*?) \|", text.split("\n## ")[0], re.M)
    rows = [feature for feature, state, _ in features("trl") if state.startswith("not tried")]
    assert listed == [feature.partition(":")[0] for feature in rows]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_runs_and_what_is_refused_has_a_test(adapter):
    states = set()
    for feature, state, tests in features(adapter):
        states.add(state.split(":")[0])
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert bool(named) == (not state.startswith("not tried")), feature
        for file, name in named:
            source = (ROOT / adapter / "tests" / file).read_text()
            assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{file}::{name}"
    assert states == {"runs", "refused", "not tried"}
