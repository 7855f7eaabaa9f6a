"""Models by name: the embedded policy of `tokenweights-lab`, and whatever transformers loads."""

import importlib
import logging
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tokenweights._errors import invalid
from tokenweights._hints import shown
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


def imported_transformers() -> ModuleType:
    """The package, while the Hub's client keeps each of its tries to reach it to itself."""
    transformers = imported("transformers", extra="capture")
    # Its import has set a level of its own.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return transformers


def loaded_model(name: str, *, dtype: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer, the model in evaluation mode."""
    transformers = imported_transformers()
    place = model_place(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    except Exception as error:  # whatever a configuration leads its own code to
        hint = "Pass a directory with a model and its tokenizer, `lab`, or a name on the Hub."
        got = f"{name}: {first_line(error)}"
        raise invalid("inspect", "MODEL_OR_PATH", "to load", got, hint) from error
    return model.to(device).eval(), tokenizer


def require_placement(*, dtype: str, device: str) -> None:
    """Raises unless a model of that type could compute on that device, before it is loaded.

    Args:
        dtype: `auto`, or the name of a type of torch.
        device: A device as torch names it.

    Raises:
        TokenWeightsError: If there is no such type, or the machine has no such device.
    """
    meant = torch.float32 if dtype == "auto" else getattr(torch, dtype, None)
    # Types of one byte are storage: no layer computes in them.
    floating = isinstance(meant, torch.dtype) and meant.is_floating_point and meant.itemsize > 1
    if not floating:
        condition = "auto or a floating-point type of torch that models compute in"
        hint = "Pass auto, float32, bfloat16, float16 or float64."
        raise invalid("inspect", "--dtype", condition, shown(dtype), hint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some names of devices are old
            one = torch.ones(1, 1, dtype=meant, device=device)
            (one @ one).item()
    except Exception as error:  # each backend that is missing has a kind of its own
        got = f"{device}: {first_line(error).partition('. ')[0]}"
        hint = "Leave it out for cpu, or pass a device that torch finds here."
        raise invalid("inspect", "--device", "that this machine has", got, hint) from error


def first_line(error: Exception) -> str:
    """What an error says first, or what it is, without the full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
