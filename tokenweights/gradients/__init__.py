"""Gradients of token groups and of single tokens, and how they lie towards that of all tokens."""

from tokenweights.gradients.alignment import TokenAlignment as TokenAlignment
from tokenweights.gradients.alignment import token_alignment as token_alignment
from tokenweights.gradients.caught import CaughtGradients as CaughtGradients
from tokenweights.gradients.dispersion import OnlineDispersion as OnlineDispersion
from tokenweights.gradients.estimability import expected_random_cosine as expected_random_cosine
from tokenweights.gradients.estimability import expected_random_error as expected_random_error
from tokenweights.gradients.geometry import GradientGeometry as GradientGeometry
from tokenweights.gradients.geometry import gradient_geometry as gradient_geometry
from tokenweights.gradients.groups import GroupGradients as GroupGradients
from tokenweights.gradients.groups import group_gradients as group_gradients
from tokenweights.gradients.probe import GradientProbe as GradientProbe
from tokenweights.gradients.probe import ProbeGeometry as ProbeGeometry
from tokenweights.gradients.ratios import BandShares as BandShares
from tokenweights.gradients.ratios import band_shares as band_shares
from tokenweights.gradients.ratios import extreme_tokens as extreme_tokens
from tokenweights.gradients.ratios import group_projection_ratios as group_projection_ratios
from tokenweights.gradients.selection import selected_parameters as selected_parameters
from tokenweights.gradients.series import GradientSeries as GradientSeries
from tokenweights.gradients.series import unclipped_losses as unclipped_losses
