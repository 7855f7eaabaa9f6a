"""Tables of what the steps found on a GPU, put into RESULTS.md; toy results are refused.

`python benchmarks/gpu/results.py runs/gpu --record benchmarks/kernels/RESULTS.md`
"""

import argparse
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"


def found_in(folder: Path) -> dict[str, dict[str, Any]]:
    """What each step left, all of it from one device and commit.

    Raises:
        SystemExit: If there is nothing, if it was a toy, or if devices or commits differ.
    """
    steps = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not steps:
        raise SystemExit(f"{folder} holds no results")
    toys = [name for name, step in steps.items() if step["about"]["toy"]]
    if toys:
        raise SystemExit(f"toy results are no results: {', '.join(toys)}")
    if len({json.dumps(step["about"], sort_keys=True) for step in steps.values()}) > 1:
        raise SystemExit("results are of several devices, commits or versions")
    return steps


def lines_of(steps: dict[str, dict[str, Any]]) -> list[str]:
    """A line on the machine, then one table for each step."""
    about = next(iter(steps.values()))["about"]
    lines = [f"{about['device']}, torch {about['torch']}, triton {about['triton']}, "]
    lines[0] += f"commit {about['commit']}."
    for name, step in steps.items():
        lines += ["", f"**{name.capitalize()}**", "", "| part | found |", "|---|---|"]
        for part, record in step["parts"].items():
            for label, text in rows(part, record):
                lines.append(f"| {label} | {text} |")
    return lines


def rows(part: str, record: dict[str, Any]) -> list[tuple[str, str]]:
    """One row for a number or a reason, one for each of many measurements."""
    if "found" not in record:
        (reason,) = (record[kind] for kind in ("missing", "failed") if kind in record)
        return [(part, reason.replace("\n", " ").replace("|", "/")[:200])]
    found = record["found"]
    if isinstance(found, list):
        names = [
            " ".join(str(one[k]) for k in ("role", "name", "tiles") if k in one) for one in found
        ]
        return [(f"{part}, {name}", shown(one)) for name, one in zip(names, found, strict=True)]
    return [(part, shown(found))]


def shown(found: dict[str, Any]) -> str:
    """Numbers with their names."""
    texts = []
    for name, value in found.items():
        if isinstance(value, dict):
            texts.append(f"{name}: {shown(value)}")
        elif isinstance(value, float):
            texts.append(f"{name} {value:.4g}")
        elif value not in (None, "") and name not in ("role", "name", "tiles"):
            texts.append(f"{name} {value}")
    return ", ".join(texts).replace("|", "/")


def recorded(text: str, lines: list[str]) -> str:
    """The text with the lines between the marks, which are put at its end if there are none."""
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, "", *lines, "", END]) + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--record", type=Path, help="results file to put the tables into")
    arguments = parser.parse_args()
    lines = lines_of(found_in(arguments.folder))
    print("\n".join(lines))
    if arguments.record is not None:
        arguments.record.write_text(recorded(arguments.record.read_text(), lines))


if __name__ == "__main__":
    main()
