"""Recipes: signal, rule, schedule and denominator of a run, declared in one place.

A recipe is the only thing a trainer adapter reads. Every run of the paper is one by name.
"""

from tokenweights.recipes.config import TokenWeightsConfig as TokenWeightsConfig
from tokenweights.recipes.named import recipe as recipe
from tokenweights.recipes.named import recipe_names as recipe_names
from tokenweights.recipes.record import Recipe as Recipe
from tokenweights.recipes.rollout import WeightedRollout as WeightedRollout
from tokenweights.recipes.rollout import rollout_recipe as rollout_recipe
from tokenweights.recipes.rollout import weighted_rollout as weighted_rollout
