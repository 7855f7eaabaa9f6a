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

    def on_function_instance(
        self, *, node: ast.FunctionDef, func: griffe.Function, **options: Any
    ) -> None:
        """Takes annotations with a `#` as they stand; it would begin a comment in a type."""
        for argument in (*node.args.args, *node.args.kwonlyargs):
            source = ast.unparse(argument.annotation) if argument.annotation else ""
            if "#" in source:
                func.parameters[argument.arg].annotation = source
