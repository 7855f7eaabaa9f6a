import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenweights as tw
from tokenweights import TokenWeightsError


@given(st.integers(0, 2**31), st.integers(1, 3))
def test_equations_4_to_6_agree_with_numpy(seed, tensors):
    generator = np.random.default_rng(seed)
    subset = [generator.normal(size=(2, 3)) for _ in range(tensors)]
    full = [generator.normal(size=(2, 3)) for _ in range(tensors)]
    s, g = np.concatenate(subset).ravel(), np.concatenate(full).ravel()
    geometry = tw.gradient_geometry(
        [torch.from_numpy(a) for a in subset], [torch.from_numpy(a) for a in full]
    )
    norm_s, norm_g = np.linalg.norm(s), np.linalg.norm(g)
    assert geometry.norm_ratio == pytest.approx(norm_s / norm_g)
    assert geometry.cosine == pytest.approx(s @ g / norm_s / norm_g)
    assert geometry.projection_ratio == pytest.approx(s @ g / norm_g**2)


@given(st.integers(0, 2**31), st.sampled_from([1e-30, 1.0, 1e15]), st.booleans())
def test_the_cosine_of_parallel_gradients_is_one_and_not_beyond(seed, scale, opposite):
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(7, generator=generator, dtype=torch.float64) * scale
    sign = -1 if opposite else 1
    geometry = tw.gradient_geometry([gradient * (sign / 3)], [gradient])
    assert abs(geometry.cosine) <= 1 and geometry.cosine == pytest.approx(sign, abs=1e-15)


def test_half_precision_does_not_overflow():
    large = torch.full((10,), 3e4, dtype=torch.float16)
    assert tw.gradient_geometry([large], [large]) == tw.GradientGeometry(1.0, 1.0, 1.0)


def test_zero_gradients_have_documented_values():
    zero, one = [torch.zeros(2)], [torch.ones(2)]
    geometry = tw.gradient_geometry(zero, one)
    assert geometry.norm_ratio == geometry.projection_ratio == 0 and math.isnan(geometry.cosine)
    assert math.isnan(tw.gradient_geometry(one, zero).projection_ratio)


def test_other_shapes_are_refused():
    with pytest.raises(TokenWeightsError, match="same shapes"):
        tw.gradient_geometry([torch.ones(2)], [torch.ones(3)])
    with pytest.raises(TokenWeightsError, match="`full` with a tensor, got none"):
        tw.gradient_geometry([], [])
