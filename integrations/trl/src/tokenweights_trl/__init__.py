"""Token weights inside TRL's `GRPOTrainer`, without a fork and without a patch."""

from tokenweights_trl.config import TokenWeightsGRPOConfig
from tokenweights_trl.probe import GradientProbeMixin
from tokenweights_trl.trainer import TokenWeightsGRPOTrainer, TokenWeightsMixin

__all__ = [
    "GradientProbeMixin",
    "TokenWeightsGRPOConfig",
    "TokenWeightsGRPOTrainer",
    "TokenWeightsMixin",
]
