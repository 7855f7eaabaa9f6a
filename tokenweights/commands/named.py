"""A recipe on a command line: its name, or its fields as JSON."""

import json
from typing import Any

from tokenweights._errors import invalid, nearest
from tokenweights._hints import shown
from tokenweights.recipes import recipe_names
from tokenweights.recipes.published import NO_WEIGHTS

_FORMS = 'Write `low2high`, or `{"name": "low2high", "warmup_steps": 50}`.'


def recipe_choice(text: str, *, command: str, argument: str) -> str | dict[str, Any]:
    """What `recipe` takes, whose name, if it has one in place of a rule, is known.

    Args:
        text: The name, or a JSON object with the fields.
        command: The command that was given it, for messages.
        argument: Its argument, for messages.

    Returns:
        The name, or the fields.

    Raises:
        TokenWeightsError: If it is neither; the message never lists all names.

    Example:
        >>> recipe_choice('{"name": "low2high"}', command="recipes", argument="NAME")
        {'name': 'low2high'}
    """
    choice = _fields(text, command, argument) if text.lstrip().startswith("{") else text
    if isinstance(choice, dict) and "rule" in choice:
        return choice
    name = choice.get("name") if isinstance(choice, dict) else choice
    if not isinstance(name, str):
        condition = "with the name of a recipe, or with a rule"
        raise invalid(command, argument, condition, shown(text), _FORMS)
    # Names of what no weights can carry are refused by `recipe`, with the reason.
    if name not in {*recipe_names(), *NO_WEIGHTS}:
        near = nearest(name, recipe_names())
        meant = f"Did you mean {near!r}? " if near else ""
        hint = f"{meant}`tokenweights recipes` lists them."
        raise invalid(command, argument, "one of the recipes", shown(name), hint)
    return choice


def _fields(text: str, command: str, argument: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        condition = "a recipe's name or valid JSON"
        raise invalid(command, argument, condition, shown(text), _FORMS) from error
