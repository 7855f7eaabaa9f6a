"""Training from the command line: `python -m tokenweights_verl.train --help`."""

import sys

import hydra
from omegaconf import DictConfig, OmegaConf
from tokenweights.adapters import FILES, TokenWeightsError, write_run_json
from verl.trainer import main_ppo

from tokenweights_verl.config import token_weights_config
from tokenweights_verl.plugin import require_plugin
from tokenweights_verl.scores import placed


@hydra.main(config_path="configurations", config_name="token_weights", version_base=None)
def main(config: DictConfig) -> None:
    """VeRL's `main_ppo`, once the plug-in and the token weights are known to be right."""
    try:
        require_plugin()
        asked = token_weights_config(config)
        placed(asked.token_recipe, config)
    except TokenWeightsError as error:
        sys.exit(f"train: error: {error}")
    # Ray's processes have another working directory than this one.
    OmegaConf.update(config, "token_weights", {name: getattr(asked, name) for name in FILES})
    path, data = config.actor_rollout_ref.model.path, config.data
    write_run_json(asked, trainer="verl", model=path, data=str(data.train_files), seed=data.seed)
    main_ppo.main(config)


if __name__ == "__main__":
    main()
