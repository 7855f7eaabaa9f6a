"""What VeRL imports in every process, as the plug-in `tokenweights` of the group `verl.plugins`.

VeRL hides a plug-in that fails. So this one says so itself, and a launcher asks `require_plugin`.
"""

import logging
import os
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec

from tokenweights._errors import TokenWeightsError


def require_plugin() -> None:
    """Raises unless VeRL loads this plug-in in the processes of a run.

    Raises:
        TokenWeightsError: With the reason why it does not.
    """
    try:
        import_module("tokenweights_verl.trainer")
    except Exception as error:
        raise TokenWeightsError(f"The plug-in tokenweights does not load: {error}") from error
    if "tokenweights" not in entry_points(group="verl.plugins").names:
        raise TokenWeightsError("The distribution tokenweights-verl is not installed.")
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if policy != "auto" and "tokenweights" not in [name.strip() for name in policy.split(",")]:
        raise TokenWeightsError(f"VERL_USE_EXTERNAL_PLUGINS={policy} leaves out `tokenweights`.")


try:
    import_module("tokenweights_verl.trainer")  # registers itself and the engine
    if find_spec("megatron"):
        import_module("tokenweights_verl.megatron")
except Exception:
    logging.getLogger(__name__).exception("The plug-in tokenweights does not load")
    raise
