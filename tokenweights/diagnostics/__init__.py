"""What signals and weights look like over a batch: statistics that merge over ranks."""

from tokenweights.diagnostics.correlation import pearson_correlation as pearson_correlation
from tokenweights.diagnostics.correlation import rank_correlation as rank_correlation
from tokenweights.diagnostics.dynamics import GroupDynamics as GroupDynamics
from tokenweights.diagnostics.dynamics import group_dynamics as group_dynamics
from tokenweights.diagnostics.token_weights import token_weight_metrics as token_weight_metrics
