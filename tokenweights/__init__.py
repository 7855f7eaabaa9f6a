"""tokenweights: who counts, and how much, when a language model learns by reinforcement.

Signals score response tokens; partitions, weights and schedules turn scores into weights; losses
aggregate with an explicit denominator; gradients and diagnostics show what that did. Tensors in,
tensors out: trainers are wired in by the adapters, which are distributions of their own.
"""

from tokenweights._errors import TokenWeightsError as TokenWeightsError
from tokenweights.attention import AttentionStatistics as AttentionStatistics
from tokenweights.attention import ExchangeBytes as ExchangeBytes
from tokenweights.attention import HeadClasses as HeadClasses
from tokenweights.attention import Received as Received
from tokenweights.attention import attention_distance as attention_distance
from tokenweights.attention import attention_entropy as attention_entropy
from tokenweights.attention import attention_entropy_from_weights as attention_entropy_from_weights
from tokenweights.attention import attention_entropy_varlen as attention_entropy_varlen
from tokenweights.attention import attention_received as attention_received
from tokenweights.attention import attention_received_varlen as attention_received_varlen
from tokenweights.attention import attention_statistics as attention_statistics
from tokenweights.attention import attention_weights as attention_weights
from tokenweights.attention import head_classes as head_classes
from tokenweights.attention import packed_distance as packed_distance
from tokenweights.attention import packed_entropy as packed_entropy
from tokenweights.attention import packed_received as packed_received
from tokenweights.attention import received_bytes as received_bytes
from tokenweights.attention import sequence_parallel_bytes as sequence_parallel_bytes
from tokenweights.attention import sequence_parallel_distance as sequence_parallel_distance
from tokenweights.attention import sequence_parallel_entropy as sequence_parallel_entropy
from tokenweights.attention import sequence_parallel_received as sequence_parallel_received
from tokenweights.attention import sharded_bytes as sharded_bytes
from tokenweights.attention import sharded_entropy as sharded_entropy
from tokenweights.attention import tensor_parallel_bytes as tensor_parallel_bytes
from tokenweights.attention import tensor_parallel_distance as tensor_parallel_distance
from tokenweights.attention import tensor_parallel_entropy as tensor_parallel_entropy
from tokenweights.attention import tensor_parallel_received as tensor_parallel_received
from tokenweights.capture import AttentionCapture as AttentionCapture
from tokenweights.capture import CapturedAttention as CapturedAttention
from tokenweights.capture import attention_layers as attention_layers
from tokenweights.capture import capture_attention as capture_attention
from tokenweights.capture import middle_layer as middle_layer
from tokenweights.diagnostics import CollapseMonitor as CollapseMonitor
from tokenweights.diagnostics import CollapseThresholds as CollapseThresholds
from tokenweights.diagnostics import CollapseVerdict as CollapseVerdict
from tokenweights.diagnostics import GroupDynamics as GroupDynamics
from tokenweights.diagnostics import LayerAgreement as LayerAgreement
from tokenweights.diagnostics import QuadrantTokens as QuadrantTokens
from tokenweights.diagnostics import RolloutStatistics as RolloutStatistics
from tokenweights.diagnostics import ScoreMoments as ScoreMoments
from tokenweights.diagnostics import SubsetOverlap as SubsetOverlap
from tokenweights.diagnostics import SupportConcentration as SupportConcentration
from tokenweights.diagnostics import group_dynamics as group_dynamics
from tokenweights.diagnostics import layer_agreement as layer_agreement
from tokenweights.diagnostics import partition_jaccard as partition_jaccard
from tokenweights.diagnostics import pearson_correlation as pearson_correlation
from tokenweights.diagnostics import quadrant_tokens as quadrant_tokens
from tokenweights.diagnostics import rank_correlation as rank_correlation
from tokenweights.diagnostics import response_statistics as response_statistics
from tokenweights.diagnostics import rollout_statistics as rollout_statistics
from tokenweights.diagnostics import score_moments as score_moments
from tokenweights.diagnostics import subset_overlap as subset_overlap
from tokenweights.diagnostics import support_by_entropy as support_by_entropy
from tokenweights.diagnostics import support_concentration as support_concentration
from tokenweights.diagnostics import token_weight_metrics as token_weight_metrics
from tokenweights.distributed import gathered as gathered
from tokenweights.distributed import global_extrema as global_extrema
from tokenweights.distributed import global_sum as global_sum
from tokenweights.distributed import slice_positions as slice_positions
from tokenweights.gradients import BandShares as BandShares
from tokenweights.gradients import CaughtGradients as CaughtGradients
from tokenweights.gradients import GradientGeometry as GradientGeometry
from tokenweights.gradients import GradientProbe as GradientProbe
from tokenweights.gradients import GradientSeries as GradientSeries
from tokenweights.gradients import GroupGradients as GroupGradients
from tokenweights.gradients import OnlineDispersion as OnlineDispersion
from tokenweights.gradients import ProbeGeometry as ProbeGeometry
from tokenweights.gradients import TokenAlignment as TokenAlignment
from tokenweights.gradients import band_shares as band_shares
from tokenweights.gradients import expected_random_cosine as expected_random_cosine
from tokenweights.gradients import expected_random_error as expected_random_error
from tokenweights.gradients import extreme_tokens as extreme_tokens
from tokenweights.gradients import gradient_geometry as gradient_geometry
from tokenweights.gradients import group_gradients as group_gradients
from tokenweights.gradients import group_projection_ratios as group_projection_ratios
from tokenweights.gradients import selected_parameters as selected_parameters
from tokenweights.gradients import token_alignment as token_alignment
from tokenweights.gradients import unclipped_losses as unclipped_losses
from tokenweights.likelihood import advantage_covariance as advantage_covariance
from tokenweights.likelihood import entropy_sensitivity as entropy_sensitivity
from tokenweights.likelihood import importance_ratio as importance_ratio
from tokenweights.likelihood import log_perplexity as log_perplexity
from tokenweights.likelihood import reference_divergence as reference_divergence
from tokenweights.likelihood import relative_surprisal as relative_surprisal
from tokenweights.likelihood import sampled_probability as sampled_probability
from tokenweights.likelihood import surprisal as surprisal
from tokenweights.losses import GatedLoss as GatedLoss
from tokenweights.losses import aggregate_loss as aggregate_loss
from tokenweights.losses import clipped_surrogate_loss as clipped_surrogate_loss
from tokenweights.losses import gated_loss as gated_loss
from tokenweights.losses import loss_denominator as loss_denominator
from tokenweights.losses import weighted_token_mean as weighted_token_mean
from tokenweights.masked import masked_extrema as masked_extrema
from tokenweights.masked import masked_mean as masked_mean
from tokenweights.masked import masked_order as masked_order
from tokenweights.masked import masked_ranks as masked_ranks
from tokenweights.masked import masked_sum as masked_sum
from tokenweights.partition import back_fraction as back_fraction
from tokenweights.partition import bernoulli_subset as bernoulli_subset
from tokenweights.partition import bottom_fraction as bottom_fraction
from tokenweights.partition import first_tokens as first_tokens
from tokenweights.partition import front_fraction as front_fraction
from tokenweights.partition import matched_random as matched_random
from tokenweights.partition import median_quadrants as median_quadrants
from tokenweights.partition import quantile_bins as quantile_bins
from tokenweights.partition import random_fraction as random_fraction
from tokenweights.partition import top_fraction as top_fraction
from tokenweights.recipes import Recipe as Recipe
from tokenweights.recipes import RolloutBatch as RolloutBatch
from tokenweights.recipes import TokenWeightsConfig as TokenWeightsConfig
from tokenweights.recipes import WeightedRollout as WeightedRollout
from tokenweights.recipes import probe_head_classes as probe_head_classes
from tokenweights.recipes import recipe as recipe
from tokenweights.recipes import recipe_names as recipe_names
from tokenweights.recipes import require_columns as require_columns
from tokenweights.recipes import rollout_recipe as rollout_recipe
from tokenweights.recipes import weighted_rollout as weighted_rollout
from tokenweights.recipes import with_head_classes as with_head_classes
from tokenweights.rewards import Interval as Interval
from tokenweights.rewards import bootstrap_interval as bootstrap_interval
from tokenweights.rewards import boxed_answer as boxed_answer
from tokenweights.rewards import boxed_match_reward as boxed_match_reward
from tokenweights.rewards import majority_at_k as majority_at_k
from tokenweights.rewards import mean_at_k as mean_at_k
from tokenweights.rewards import overlong_penalty as overlong_penalty
from tokenweights.rewards import pass_at_k as pass_at_k
from tokenweights.rewards import reference_answer as reference_answer
from tokenweights.scaling import bounded_map as bounded_map
from tokenweights.scaling import mean_one as mean_one
from tokenweights.scaling import min_max as min_max
from tokenweights.scaling import z_scores as z_scores
from tokenweights.schedules import AdaptiveProgress as AdaptiveProgress
from tokenweights.schedules import Endpoints as Endpoints
from tokenweights.schedules import adaptive_progress as adaptive_progress
from tokenweights.schedules import constant_schedule as constant_schedule
from tokenweights.schedules import cosine_schedule as cosine_schedule
from tokenweights.schedules import endpoint_schedule as endpoint_schedule
from tokenweights.schedules import high_to_low as high_to_low
from tokenweights.schedules import linear_schedule as linear_schedule
from tokenweights.schedules import low_to_high as low_to_high
from tokenweights.schedules import piecewise_schedule as piecewise_schedule
from tokenweights.schedules import static_endpoints as static_endpoints
from tokenweights.selection import score_quantile as score_quantile
from tokenweights.selection import select as select
from tokenweights.selection import select_within as select_within
from tokenweights.selection import selection_bytes as selection_bytes
from tokenweights.signals import align_to_decision as align_to_decision
from tokenweights.signals import align_to_own as align_to_own
from tokenweights.signals import loss_magnitude as loss_magnitude
from tokenweights.signals import predictive_entropy as predictive_entropy
from tokenweights.signals import relative_position as relative_position
from tokenweights.signals import self_certainty as self_certainty
from tokenweights.weights import ScoreExtrema as ScoreExtrema
from tokenweights.weights import WeightStatistics as WeightStatistics
from tokenweights.weights import endpoint_weights as endpoint_weights
from tokenweights.weights import match_mass as match_mass
from tokenweights.weights import score_extrema as score_extrema
from tokenweights.weights import softmax_partition as softmax_partition
from tokenweights.weights import subset_weights as subset_weights
from tokenweights.weights import weight_statistics as weight_statistics

__version__ = "0.1.0"

__all__ = [
    "AdaptiveProgress",
    "AttentionCapture",
    "AttentionStatistics",
    "BandShares",
    "CapturedAttention",
    "CaughtGradients",
    "CollapseMonitor",
    "CollapseThresholds",
    "CollapseVerdict",
    "Endpoints",
    "ExchangeBytes",
    "GatedLoss",
    "GradientGeometry",
    "GradientProbe",
    "GradientSeries",
    "GroupDynamics",
    "GroupGradients",
    "HeadClasses",
    "Interval",
    "LayerAgreement",
    "OnlineDispersion",
    "ProbeGeometry",
    "QuadrantTokens",
    "Received",
    "Recipe",
    "RolloutBatch",
    "RolloutStatistics",
    "ScoreExtrema",
    "ScoreMoments",
    "SubsetOverlap",
    "SupportConcentration",
    "TokenAlignment",
    "TokenWeightsConfig",
    "TokenWeightsError",
    "WeightStatistics",
    "WeightedRollout",
    "adaptive_progress",
    "advantage_covariance",
    "aggregate_loss",
    "align_to_decision",
    "align_to_own",
    "attention_distance",
    "attention_entropy",
    "attention_entropy_from_weights",
    "attention_entropy_varlen",
    "attention_layers",
    "attention_received",
    "attention_received_varlen",
    "attention_statistics",
    "attention_weights",
    "back_fraction",
    "band_shares",
    "bernoulli_subset",
    "bootstrap_interval",
    "bottom_fraction",
    "bounded_map",
    "boxed_answer",
    "boxed_match_reward",
    "capture_attention",
    "clipped_surrogate_loss",
    "constant_schedule",
    "cosine_schedule",
    "endpoint_schedule",
    "endpoint_weights",
    "entropy_sensitivity",
    "expected_random_cosine",
    "expected_random_error",
    "extreme_tokens",
    "first_tokens",
    "front_fraction",
    "gated_loss",
    "gathered",
    "global_extrema",
    "global_sum",
    "gradient_geometry",
    "group_dynamics",
    "group_gradients",
    "group_projection_ratios",
    "head_classes",
    "high_to_low",
    "importance_ratio",
    "layer_agreement",
    "linear_schedule",
    "log_perplexity",
    "loss_denominator",
    "loss_magnitude",
    "low_to_high",
    "majority_at_k",
    "masked_extrema",
    "masked_mean",
    "masked_order",
    "masked_ranks",
    "masked_sum",
    "match_mass",
    "matched_random",
    "mean_at_k",
    "mean_one",
    "median_quadrants",
    "middle_layer",
    "min_max",
    "overlong_penalty",
    "packed_distance",
    "packed_entropy",
    "packed_received",
    "partition_jaccard",
    "pass_at_k",
    "pearson_correlation",
    "piecewise_schedule",
    "predictive_entropy",
    "probe_head_classes",
    "quadrant_tokens",
    "quantile_bins",
    "random_fraction",
    "rank_correlation",
    "received_bytes",
    "recipe",
    "recipe_names",
    "reference_answer",
    "reference_divergence",
    "relative_position",
    "relative_surprisal",
    "require_columns",
    "response_statistics",
    "rollout_recipe",
    "rollout_statistics",
    "sampled_probability",
    "score_extrema",
    "score_moments",
    "score_quantile",
    "select",
    "select_within",
    "selected_parameters",
    "selection_bytes",
    "self_certainty",
    "sequence_parallel_bytes",
    "sequence_parallel_distance",
    "sequence_parallel_entropy",
    "sequence_parallel_received",
    "sharded_bytes",
    "sharded_entropy",
    "slice_positions",
    "softmax_partition",
    "static_endpoints",
    "subset_overlap",
    "subset_weights",
    "support_by_entropy",
    "support_concentration",
    "surprisal",
    "tensor_parallel_bytes",
    "tensor_parallel_distance",
    "tensor_parallel_entropy",
    "tensor_parallel_received",
    "token_alignment",
    "token_weight_metrics",
    "top_fraction",
    "unclipped_losses",
    "weight_statistics",
    "weighted_rollout",
    "weighted_token_mean",
    "with_head_classes",
    "z_scores",
]
