"""VeRL's configuration as the launcher composes it."""

import copy
from functools import cache

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf


def composed(*overrides):
    with initialize_config_module("tokenweights_verl.configurations", version_base=None):
        return compose("token_weights", overrides=list(overrides))


_base = cache(composed)  # half a second each


def with_recipe(name, *overrides):
    """The configuration with a recipe named as `token_weights.recipe=` would name it."""
    config = copy.deepcopy(_base(*overrides))
    OmegaConf.update(config, "token_weights.recipe", name)
    return config
