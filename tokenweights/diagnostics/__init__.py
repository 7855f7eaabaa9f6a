"""What signals and weights look like over a batch, and whether a run is collapsing.

Statistics are records that merge over micro-batches (`merged`) and over ranks (`group=`).
"""

from tokenweights.diagnostics.collapse import CollapseMonitor as CollapseMonitor
from tokenweights.diagnostics.collapse import CollapseVerdict as CollapseVerdict
from tokenweights.diagnostics.correlation import pearson_correlation as pearson_correlation
from tokenweights.diagnostics.correlation import rank_correlation as rank_correlation
from tokenweights.diagnostics.dynamics import GroupDynamics as GroupDynamics
from tokenweights.diagnostics.dynamics import group_dynamics as group_dynamics
from tokenweights.diagnostics.layers import LayerAgreement as LayerAgreement
from tokenweights.diagnostics.layers import layer_agreement as layer_agreement
from tokenweights.diagnostics.moments import ScoreMoments as ScoreMoments
from tokenweights.diagnostics.moments import score_moments as score_moments
from tokenweights.diagnostics.overlap import SubsetOverlap as SubsetOverlap
from tokenweights.diagnostics.overlap import partition_jaccard as partition_jaccard
from tokenweights.diagnostics.overlap import subset_overlap as subset_overlap
from tokenweights.diagnostics.rollouts import RolloutStatistics as RolloutStatistics
from tokenweights.diagnostics.rollouts import rollout_statistics as rollout_statistics
from tokenweights.diagnostics.support import SupportConcentration as SupportConcentration
from tokenweights.diagnostics.support import response_statistics as response_statistics
from tokenweights.diagnostics.support import support_by_entropy as support_by_entropy
from tokenweights.diagnostics.support import support_concentration as support_concentration
from tokenweights.diagnostics.thresholds import CollapseThresholds as CollapseThresholds
from tokenweights.diagnostics.token_weights import token_weight_metrics as token_weight_metrics
from tokenweights.diagnostics.tokens import QuadrantTokens as QuadrantTokens
from tokenweights.diagnostics.tokens import quadrant_tokens as quadrant_tokens
