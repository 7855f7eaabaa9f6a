"""What VeRL imports in every process, as the plug-in `tokenweights` of the group `verl.plugins`.

VeRL hides a plug-in that fails, at level DEBUG. So this one says so itself, and a launcher can
ask `require_plugin`.
"""

import logging
import os
from importlib import import_module
from importlib.metadata import entry_points

from tokenweights._errors import TokenWeightsError

# Importing them registers engine and trainers. Modules, not names: one of them may be what
# imported VeRL in the first place, and is then still on its way.
PARTS = ("tokenweights_verl.engine", "tokenweights_verl.trainer")


def require_plugin() -> None:
    """Raises unless VeRL loads this plug-in in every process of a run.

    Raises:
        TokenWeightsError: With the reason why it does not.
    """
    found = {point.name for point in entry_points(group="verl.plugins")}
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    allowed = found if policy == "auto" else {name.strip() for name in policy.split(",")}
    try:
        for part in PARTS:
            import_module(part)
        if "tokenweights" not in found:
            raise LookupError("the distribution tokenweights-verl is not installed")
        if "tokenweights" not in allowed:
            raise LookupError(f"VERL_USE_EXTERNAL_PLUGINS is {policy!r} and leaves it out")
    except Exception as error:
        raise TokenWeightsError(f"VeRL does not load the plug-in tokenweights: {error}") from error


try:
    for part in PARTS:
        import_module(part)
except Exception:
    logging.getLogger(__name__).exception("The plug-in tokenweights does not load")
    raise
