"""Gradients of token groups, and how they lie towards the gradient of all tokens."""

from tokenweights.gradients.estimability import expected_random_cosine as expected_random_cosine
from tokenweights.gradients.estimability import expected_random_error as expected_random_error
from tokenweights.gradients.geometry import GradientGeometry as GradientGeometry
from tokenweights.gradients.geometry import gradient_geometry as gradient_geometry
from tokenweights.gradients.groups import GroupGradients as GroupGradients
from tokenweights.gradients.groups import group_gradients as group_gradients
