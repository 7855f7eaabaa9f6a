"""List the named recipes, or describe one: in words and equations, or as JSON."""

import argparse
import json
from collections.abc import Iterator

from tokenweights.commands.named import recipe_choice
from tokenweights.commands.terminal import aligned
from tokenweights.recipes import Recipe, recipe, recipe_names
from tokenweights.recipes.parts import part_lines
from tokenweights.recipes.published import PUBLISHED
from tokenweights.recipes.rules import EndpointWeights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="a recipe, its name or its fields as JSON (default: all, a line each)",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for a configuration")


def run(options: argparse.Namespace) -> int:
    """Prints one recipe, or all of them.

    Args:
        options: What was parsed.

    Returns:
        Exit status.
    """
    one = None
    if options.name is not None:
        one = recipe(recipe_choice(options.name, command="recipes", argument="NAME"))
    if options.json:
        values = (
            [recipe(name).to_dict() for name in recipe_names()] if one is None else one.to_dict()
        )
        print(json.dumps(values, indent=2))
    else:
        print("\n".join(_listing()) if one is None else one.describe())
    return 0


def _listing() -> Iterator[str]:
    paper = map(recipe, recipe_names(source="paper"))
    field = map(recipe, recipe_names(source="field"))
    yield "Runs of the paper, arXiv 2605.07660"
    yield from aligned([(made.name, _scored_by(made), _weights(made)) for made in paper])
    yield "\nRules of the field"
    yield from aligned(
        [(made.name, _scored_by(made), PUBLISHED[made.name].source) for made in field]
    )


def _scored_by(made: Recipe) -> str:
    return "-" if made.signal is None else part_lines(made.signal)[0].partition(", ")[0]


def _weights(made: Recipe) -> str:
    rule = made.rule
    lines = [rule.schedule_line()] if isinstance(rule, EndpointWeights) else part_lines(rule)
    return "; ".join(lines).partition("  (Eq.")[0]
