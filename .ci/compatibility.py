"""The table of docs/compatibility.md: which versions the adapters' tests ran with.

Usage:
    python .ci/compatibility.py installed        print what is installed here, as JSON
    python .ci/compatibility.py table REPORTS    write what the runs in REPORTS saw into the page
    python .ci/compatibility.py check REPORTS    exit with 1 if the page lacks one of these runs
"""

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from xml.etree import ElementTree

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
TRAINERS = ("trl", "verl", "openrlhf")
COLUMNS = ("torch", "transformers", "numpy")
HEAD = "| trainer | Python | torch | transformers | numpy | what passed |"
RULE = "|---" * 6 + "|"


def installed() -> dict[str, str]:
    """Versions of Python and of the packages of the table, where they are installed."""
    found = {"python": ".".join(python_version().split(".")[:2])}
    for package in (*TRAINERS, *COLUMNS):
        try:
            found[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            continue
    return found


def rows(reports: Path) -> dict[str, str]:
    """What passed, by the versions it passed with, for every adapter's suite without a failure."""
    found = {}
    for file in sorted(reports.glob("*.xml")):
        adapter, _, selected = file.stem.partition("+")
        report = ElementTree.parse(file)
        bad = [case for case in report.iter("testcase") if {"failure", "error"} & _tags(case)]
        if adapter in TRAINERS and selected in ("", "gpu") and not bad:
            seen = json.loads(file.with_suffix(".json").read_text())
            cells = (f"{adapter} {seen[adapter]}", seen["python"], *(seen[c] for c in COLUMNS))
            what = "contract, refusals, two steps" if selected else "the whole suite"
            found[" | ".join(cells)] = what
    return found


def table(text: str) -> dict[str, str]:
    """The rows of the page: what passed, by versions."""
    lines = text.split(f"{HEAD}\n")[1].split("\n\n")[0].splitlines()[1:]
    cells = [line.strip("| ").rpartition(" | ") for line in lines]
    return {versions: what for versions, _, what in cells}


def page(text: str, found: dict[str, str]) -> str:
    """The page with these rows in its table; rows of other versions stay."""
    before, after = text.split(f"{HEAD}\n")
    _, blank, rest = after.partition("\n\n")
    merged = table(text) | found
    ordered = sorted(merged.items(), key=lambda row: TRAINERS.index(row[0].split()[0]))
    lines = [HEAD, RULE, *(f"| {versions} | {what} |" for versions, what in ordered)]
    return before + "\n".join(lines) + blank + rest


def main(task: str, reports: str = "") -> int:
    """Carry out one of the tasks above; return the exit status."""
    if task == "installed":
        print(json.dumps(installed()))
        return 0
    found, text = rows(Path(reports)), PAGE.read_text()
    if task == "table":
        PAGE.write_text(page(text, found))
        return 0
    missing = {k: v for k, v in found.items() if table(text).get(k) != v}
    for versions, what in missing.items():
        print(f"docs/compatibility.md does not say: {versions}: {what}")
    return int(bool(missing))


def _tags(case: ElementTree.Element) -> set[str]:
    return {child.tag for child in case}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
