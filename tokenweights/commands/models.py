"""Models by name: the embedded policy of `tokenweights-lab`, and whatever transformers loads."""

import importlib
from pathlib import Path
from typing import Any

from tokenweights._errors import invalid
from tokenweights.commands.extras import imported

EMBEDDED = "lab"


def model_place(name: str) -> str:
    """What transformers takes for a model's name: `lab` is the embedded policy.

    A directory of that name is itself.
    """
    if name != EMBEDDED or Path(name).is_dir():
        return name
    try:
        lab = importlib.import_module("tokenweights_lab")
    except ModuleNotFoundError as error:
        hint = "It comes with the distribution `tokenweights-lab`."
        got = f"{name}, which is not installed"
        raise invalid("tokenweights", "MODEL", "a model", got, hint) from error
    return str(lab.policy_path())


def loaded_model(name: str, *, dtype: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer, the model in evaluation mode."""
    transformers = imported("transformers", extra="capture")
    place = model_place(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        hint = "Pass a directory with a model and its tokenizer, `lab`, or a name on the Hub."
        raise invalid("inspect", "MODEL_OR_PATH", "to load", f"{name}: {first}", hint) from error
    return model.to(device).eval(), tokenizer
