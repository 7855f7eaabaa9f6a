"""Recipes: a signal that scores tokens, a rule that weighs them, and a denominator, composed.

A recipe is the only thing a trainer adapter reads. Every run of the paper is one by name, and so
are rules of the field. Signals and rules are parts of `signals`, `rules`, `field` and `combine`, or
callables of your own.
"""

from tokenweights.recipes import combine as combine
from tokenweights.recipes import field as field
from tokenweights.recipes import preplan as preplan
from tokenweights.recipes import rules as rules
from tokenweights.recipes import signals as signals
from tokenweights.recipes.batch import RolloutBatch as RolloutBatch
from tokenweights.recipes.config import TokenWeightsConfig as TokenWeightsConfig
from tokenweights.recipes.heads import probe_head_classes as probe_head_classes
from tokenweights.recipes.heads import with_head_classes as with_head_classes
from tokenweights.recipes.named import recipe as recipe
from tokenweights.recipes.named import recipe_names as recipe_names
from tokenweights.recipes.parts import Rule as Rule
from tokenweights.recipes.parts import Signal as Signal
from tokenweights.recipes.recipe import Recipe as Recipe
from tokenweights.recipes.recipe import WeightedRollout as WeightedRollout
from tokenweights.recipes.rollout import corrects_sampler as corrects_sampler
from tokenweights.recipes.rollout import require_columns as require_columns
from tokenweights.recipes.rollout import rollout_recipe as rollout_recipe
from tokenweights.recipes.rollout import weighted_rollout as weighted_rollout
from tokenweights.recipes.versions import require_version as require_version
