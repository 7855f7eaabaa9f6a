"""Two habits of the code base that mkdocstrings does not know by itself."""

import ast
from typing import Any

import griffe


class HouseStyle(griffe.Extension):
    """Shows `Example:` sections as examples, and keeps `#` in the names of axes."""

    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        """Renames the section before docstrings are parsed; only `Examples:` is known."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

    def on_function(self, *, func: griffe.Function, **options: Any) -> None:
        pass

    def on_function_node(self, *, node: Any, agent: Any, **options: Any) -> None:
        pass
