"""Sections of a record that lies outside the pages, shown as they are.

A line `<!-- section "Claims" of benchmarks/paper/RESULTS.md -->` becomes what stands in that file
under the heading `## Claims`, but for pictures, which lie beside the file and not beside the page.
"""

import re
from pathlib import Path
from typing import Any

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

_LINE = re.compile(r'<!-- section "([^"]+)" of (\S+) -->')


class _Sections(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        shown: list[str] = []
        for line in lines:
            asked = _LINE.fullmatch(line)
            shown += _section(Path(asked[2]), asked[1]) if asked else [line]
        return shown


def _section(file: Path, title: str) -> list[str]:
    text = file.read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}$\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if found is None:
        raise ValueError(f"{file} has no section {title!r}")
    return [line for line in found[1].strip().splitlines() if not line.startswith("![")]


class Records(Extension):
    """Replaces lines that name a section of a file; paths are those of the repository."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Registers the lines before white space is normalized (30) and HTML is read (20)."""
        md.preprocessors.register(_Sections(md), "records", 31)


def makeExtension(**options: Any) -> Records:
    """The name by which Markdown finds the extension."""
    return Records(**options)
