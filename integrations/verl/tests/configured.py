"""VeRL's configuration as the launcher composes it."""

from hydra import compose, initialize_config_module


def composed(*overrides):
    with initialize_config_module("tokenweights_verl.configurations", version_base=None):
        return compose("token_weights", overrides=list(overrides))
