"""Maths between dollar signs as MathML, which browsers render without scripts or fonts to load."""

import re
from typing import Any

from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from math_core import LatexToMathML

# Not preceded by a backslash; may span lines of a paragraph; no white space next to the dollars.
_MATHS = r"(?<!\\)(\$\$?)(?=\S)((?:[^$\\]|\\.)+?)(?<=\S)\1"

_converter = LatexToMathML()


class _Maths(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:
        mathml = _converter.convert_with_local_state(m[2], displaystyle=m[1] == "$$")
        if m[1] == "$$":
            # MathML itself does not scroll, and a narrow screen is narrower than most equations.
            mathml = f'<span class="equation" tabindex="0">{mathml}</span>'
        return self.md.htmlStash.store(mathml), m.start(0), m.end(0)


class MathML(Extension):
    """Replaces `$...$` by inline and `$$...$$` by display maths; unknown commands are errors."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Registers the pattern after code (190) and before backslash escapes (180)."""
        md.inlinePatterns.register(_Maths(_MATHS, md), "mathml", 185)


def makeExtension(**options: Any) -> MathML:
    """The name by which Markdown finds the extension."""
    return MathML(**options)
