"""One self-contained HTML page: the shell, its assets, and how foreign text is made safe to show.

A page loads nothing: its content security policy forbids every request and runs one script only,
named by its hash.
"""

import base64
import hashlib
import html
import json
import unicodedata
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any


def asset(name: str) -> str:
    """The text of a template, style sheet or script of this package."""
    assets = resources.files("tokenweights.report").joinpath("assets")
    return assets.joinpath(name).read_text(encoding="utf-8")


def filled(name: str, **values: str) -> str:
    """The template `name` with its `$names` replaced by HTML; nothing is escaped here."""
    return Template(asset(name)).substitute(values)


def document_html(*, title: str, body: str, styles: Sequence[str], scripts: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: Text of the window's title.
        body: HTML.
        styles: Names of style sheets, after the shared one.
        scripts: Names of scripts; they become one.

    Returns:
        HTML that needs no other file.
    """
    code = "\n".join(map(asset, scripts))
    digest = hashlib.sha256(code.encode("utf-8")).digest()
    return filled(
        "document.html",
        title=escaped(title),
        body=body,
        style="\n".join(asset(name) for name in ("document.css", *styles)),
        script=code,
        script_hash=base64.b64encode(digest).decode("ascii"),
    )


def escaped(text: str) -> str:
    """Text as HTML, with characters that hide or reorder text replaced by visible names."""
    return html.escape("".join(map(visible, text)))


def facts_html(facts: Mapping[str, object]) -> str:
    """A line of names and values; values of None are left out."""
    rows = [
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(str(value))}</dd></div>"
        for name, value in facts.items()
        if value is not None
    ]
    return f'<dl class="facts">{"".join(rows)}</dl>' if rows else ""


def script_json(value: Any) -> str:
    """JSON that can stand in a `<script>` element: no character of it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def visible(character: str) -> str:
    """The character, or a visible name for one that is invisible or steers the text direction."""
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if unicodedata.category(character) in _INVISIBLE:
        return f"\u27e8U+{code:04X}\u27e9"
    return character


# Controls, formats (direction marks, zero-width characters), lone surrogates, line separators.
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
