"""The table of `docs/field.md`: each rule of the field, what it reads, and which trainer runs it.

Run from this folder, it writes the page's table anew; a test keeps the page true.
"""

import ast
from pathlib import Path

import tokenweights as tw
from tokenweights.recipes.batch import COLUMNS
from tokenweights.recipes.published import NO_WEIGHTS, PUBLISHED

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "field.md"
BEGIN, END = "<!-- table -->", "<!-- end -->"
# The option that makes a trainer have a column which it does not have by itself.
WITH = {
    "trl": {"sampler_log_probs": "vLLM", "reference_log_probs": "`beta`"},
    "verl": {"sampler_log_probs": "`calculate_log_probs`", "reference_log_probs": "a KL"},
    "openrlhf": {"sampler_log_probs": "`is_correction`", "reference_log_probs": "a KL"},
}


def columns(adapter: str) -> set[str]:
    """The columns that an adapter's source names, read without importing its trainer."""
    folder = ROOT / "integrations" / adapter / "src" / f"tokenweights_{adapter}"
    trees = [ast.parse(path.read_text()) for path in folder.glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    words = {node.value for node in nodes if isinstance(node, ast.Constant)}
    return words & set(COLUMNS)


def cell(name: str, adapter: str) -> str:
    """Whether a trainer runs a recipe: "runs", with which option, or what it does not have."""
    read = tw.recipe(name).columns
    missing = [column for column in read if column not in columns(adapter)]
    if missing:
        return f"no `{missing[0]}`"
    options = [WITH[adapter][column] for column in read if column in WITH[adapter]]
    return f"runs, with {options[0]}" if options else "runs"


def rows() -> list[str]:
    """The table's lines."""
    head = "| recipe | source | reads | scope | TRL | VeRL | OpenRLHF | own loop |"
    lines = [head, "|---" * 8 + "|"]
    for name, published in PUBLISHED.items():
        read = ", ".join(f"`{column}`" for column in tw.recipe(name).columns)
        source = published.source.partition(",")[0]
        trainers = [cell(name, adapter) for adapter in WITH]
        cells = [f"[`{name}`](recipes.md#{name})", source, read, published.own_scope, *trainers]
        lines.append("| " + " | ".join([*cells, "runs"]) + " |")
    return lines


def refused() -> list[str]:
    """A line for each rule that no recipe carries."""
    return [f"| `{name}` | {reason} |" for name, reason in NO_WEIGHTS.items()]


def table() -> str:
    """What stands between the marks of the page."""
    refusals = ["| name | why it is no weight on a rollout batch |", "|---|---|", *refused()]
    return "\n".join([*rows(), "", *refusals])


if __name__ == "__main__":
    page = PAGE.read_text()
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}")
