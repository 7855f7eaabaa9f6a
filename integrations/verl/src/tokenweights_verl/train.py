"""Training from the command line: `python -m tokenweights_verl.train --help`."""

import sys

import hydra
from omegaconf import DictConfig
from tokenweights._errors import TokenWeightsError
from verl.trainer import main_ppo

from tokenweights_verl.config import token_weights_config
from tokenweights_verl.plugin import require_plugin


@hydra.main(config_path="configurations", config_name="token_weights", version_base=None)
def main(config: DictConfig) -> None:
    """VeRL's `main_ppo`, once the plug-in and the token weights are known to be right."""
    try:
        require_plugin()
        token_weights_config(config)
    except TokenWeightsError as error:
        sys.exit(f"train: error: {error}")
    main_ppo.main(config)


if __name__ == "__main__":
    main()
