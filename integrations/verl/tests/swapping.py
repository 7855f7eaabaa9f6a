"""VeRL's trainer with another recipe every few steps, so that one run tries many.

The key `swapped` of the configuration lists them, each as `token_weights.recipe` would have it and
with the same share of the steps. VeRL imports this module, and no test does: a trainer registers
once.
"""

import copy

from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_base import register_trainer

from tokenweights_verl.config import token_weights_config
from tokenweights_verl.scores import placed
from tokenweights_verl.trainer import TokenWeightsTrainerSync


@register_trainer("tokenweights_swapping")
class SwappingTrainer(TokenWeightsTrainerSync):
    def __init__(self, config):
        config.trainer.v1.trainer_mode = "tokenweights_sync"
        super().__init__(config)

    def _compute_old_log_prob(self, batch, metrics):
        # Checked as the configuration of a run of its own would be.
        config = copy.deepcopy(self.config)
        steps = config.trainer.total_training_steps // len(config.swapped)
        asked = config.swapped[(self.global_steps - 1) // steps]
        OmegaConf.update(config, "token_weights.recipe", asked, merge=False)
        config.trainer.v1.trainer_mode = "tokenweights_sync"
        self.recipe = placed(token_weights_config(config).token_recipe, config)
        return super()._compute_old_log_prob(batch, metrics)
