"""Token weights inside OpenRLHF's PPO trainers, by subclasses at its own seams."""

from tokenweights_openrlhf.config import checked_arguments
from tokenweights_openrlhf.probe import GradientProbePolicyActor
from tokenweights_openrlhf.scores import TokenWeightsPolicyActor
from tokenweights_openrlhf.trainer import (
    TokenWeightsExperienceMaker,
    TokenWeightsMixin,
    TokenWeightsPPOTrainer,
    TokenWeightsPPOTrainerAsync,
    TokenWeightsTrainingActor,
)

__all__ = [
    "GradientProbePolicyActor",
    "TokenWeightsExperienceMaker",
    "TokenWeightsMixin",
    "TokenWeightsPPOTrainer",
    "TokenWeightsPPOTrainerAsync",
    "TokenWeightsPolicyActor",
    "TokenWeightsTrainingActor",
    "checked_arguments",
]
