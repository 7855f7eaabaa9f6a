"""VeRL's trainer with another recipe every two steps, so that one run tries them all."""

import tokenweights as tw
from verl.trainer.ppo.v1.trainer_base import register_trainer

from tokenweights_verl.scores import placed
from tokenweights_verl.trainer import TokenWeightsTrainerSync

# Recipes that need the sampler's log-probabilities, which the rollout of these tests does not have.
SAMPLED = ("sampler_ratio_truncated", "sampler_ratio_band", "second_moment_drop")
# What no setting of VeRL gives.
NEVER = ("loss_low20", "loss_high20", "certainty_shaping")
SWAPPED = [name for name in tw.recipe_names() if name not in (*SAMPLED, *NEVER)]


@register_trainer("tokenweights_swapping")
class SwappingTrainer(TokenWeightsTrainerSync):
    def __init__(self, config):
        config.trainer.v1.trainer_mode = "tokenweights_sync"
        super().__init__(config)

    def _compute_old_log_prob(self, batch, metrics):
        name = SWAPPED[(self.global_steps - 1) // 2]
        made = tw.recipe(name)
        if "_layer" in name:  # which the embedded policy does not have
            made = tw.recipe(made.to_dict() | {"layers": [-1]})
        self.recipe = placed(made, self.config)
        return super()._compute_old_log_prob(batch, metrics)
