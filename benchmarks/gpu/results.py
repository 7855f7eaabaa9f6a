"""Tables and figures of what the steps found on a GPU, put into RESULTS.md; toys are refused.

`python benchmarks/gpu/results.py runs/gpu --record benchmarks/kernels/RESULTS.md` needs no package.
Figures go into the folder `figures` beside the results file.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "kernels")]
from figures import drawn
from tables import Measurement, ratio_lines, time_lines, tuning_lines

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"


def found_in(folder: Path) -> dict[str, dict[str, Any]]:
    """What each step left, all of it from one device and commit.

    Raises:
        SystemExit: If there is nothing, if it was a toy or does not say that it was none, if it ran
            elsewhere than on a GPU, or if devices or commits differ.
    """
    steps = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not steps:
        raise SystemExit(f"{folder} holds no results")
    toys = [name for name, step in steps.items() if step["about"].get("toy") is not False]
    if toys:
        raise SystemExit(f"toy results are no results: {', '.join(toys)}")
    elsewhere = [name for name, step in steps.items() if not step["about"].get("capability")]
    if elsewhere:
        raise SystemExit(f"results of no GPU are no results: {', '.join(elsewhere)}")
    if len({json.dumps(step["about"], sort_keys=True) for step in steps.values()}) > 1:
        raise SystemExit("results are of several devices, commits or versions")
    return steps


def lines_of(steps: dict[str, dict[str, Any]]) -> list[str]:
    """A line on the machine, then the tables of each step."""
    about = next(iter(steps.values()))["about"]
    lines = [f"{about['device']}, torch {about['torch']}, triton {about['triton']}, "]
    lines[0] += f"commit {about['commit']}."
    for name, step in steps.items():
        lines += ["", f"**{name.capitalize()}**", "", *TABLES.get(name, parts_table)(step["parts"])]
    return lines


def times_tables(parts: dict[str, Any]) -> list[str]:
    """What the kernels are judged by, then every contender at every length."""
    records = [record for part in parts.values() for record in part.get("found", ())]
    measurements = sorted((Measurement(**record) for record in records), key=lambda m: m.tokens)
    missed = {part: record for part, record in parts.items() if "found" not in record}
    lines = ratio_lines(measurements) + time_lines(measurements) if measurements else []
    return [*lines, *(parts_table(missed) if missed else ())]


def tuning_tables(parts: dict[str, Any]) -> list[str]:
    """Every choice of tiles at each length, the fastest marked."""
    lines = []
    for part, record in parts.items():
        found = tuning_lines(record["found"]) if "found" in record else parts_table({part: record})
        lines += [f"{part}:", "", *found]
    return lines


def parts_table(parts: dict[str, Any]) -> list[str]:
    """One row for a part, more where it found many things."""
    found = [row for part, record in parts.items() for row in rows(part, record)]
    return ["| part | found |", "|---|---|", *(f"| {label} | {text} |" for label, text in found)]


TABLES = {"times": times_tables, "tuning": tuning_tables}


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
    steps = found_in(arguments.folder)
    lines = lines_of(steps)
    if arguments.record is not None:
        folder = arguments.record.parent / "figures"
        for name, text in drawn(steps).items():
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
            lines += ["", f"![{name.removesuffix('.svg')}](figures/{name})"]
        arguments.record.write_text(recorded(arguments.record.read_text(), lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
