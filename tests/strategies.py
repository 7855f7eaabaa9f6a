"""Hypothesis strategies and tensors that several test files share."""

import torch
from hypothesis import strategies as st
from torch import Tensor


@st.composite
def masks(draw: st.DrawFn, max_batch: int = 4, max_token: int = 12) -> Tensor:
    """Ragged masks with holes: any rows, empty ones and empty batches included."""
    batch = draw(st.integers(0, max_batch))
    token = draw(st.integers(0, max_token))
    bits = draw(st.lists(st.booleans(), min_size=batch * token, max_size=batch * token))
    return torch.tensor(bits, dtype=torch.bool).view(batch, token)


@st.composite
def scored_masks(draw: st.DrawFn, max_batch: int = 4, max_token: int = 12) -> tuple[Tensor, Tensor]:
    """Scores with ties, NaN or infinite wherever the mask is False, and their mask."""
    mask = draw(masks(max_batch, max_token))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        scores = (scores * 4).round() / 4
    poison = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]))
    return torch.where(mask, scores, poison), mask
