"""Attention inputs at the edge of what numbers and shapes can be, for every backend."""

import math

import torch
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (1.0, 1.0, 0.0, 5.0, 60.0, 1e4, 1e15, 1e-20, 1e-40, 1e-310, math.inf)
SINKS = (0.0, -math.inf, -1e30, 60.0, 1e4, 1e6, 1e12, math.inf)
MASSES = (1e-12, 0.3, 0.9, 0.999999, 1.0 - 1e-12, 1.0)
COUNTS = (1, 2, 3, 40, 2**31, 2**63, 2**70)


@st.composite
def attention_calls(draw, *, dtypes=FLOATS):
    """Query, key and the arguments of `attention_statistics`."""
    batch, kv_heads, group = (draw(st.integers(least, 2)) for least in (0, 1, 1))
    keys = draw(st.sampled_from([1, 2, 5, 33]))
    queries = draw(st.integers(0, keys))
    dim = draw(st.sampled_from([1, 8, 16]))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    query, key = (
        vectors(draw, generator, (batch, heads, tokens, dim), dtype)
        for heads, tokens in ((kv_heads * group, queries), (kv_heads, keys))
    )
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, keys, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9]))
        poison = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        key.transpose(1, 2)[~mask] = poison
        query.transpose(1, 2)[~mask[:, keys - queries :]] = poison
    sinks = None
    if draw(st.booleans()):
        sinks = torch.randn(kv_heads * group, generator=generator)
        sinks = sinks * draw(st.sampled_from([0.0, 1.0, 300.0]))
        sinks = sinks + draw(st.sampled_from(SINKS))
    causal = draw(st.booleans())
    return {
        "query": query,
        "key": key,
        "key_mask": mask,
        "sinks": sinks,
        "causal": causal,
        "window": draw(st.none() | st.sampled_from(COUNTS)) if causal else None,
        "scale": draw(st.sampled_from([None, None, 0.0, -1.0, 1.0, 1e-40, 1e-300, 1e30, 1e300])),
        "softcap": draw(st.sampled_from([None, None, 30.0, 1e-6, 1e-40, 1e30, 1e300, math.inf])),
        "top_k": draw(st.sampled_from(COUNTS)),
        "fixed_k": draw(st.sampled_from(COUNTS)),
        "local_window": draw(st.sampled_from(COUNTS)),
        "support_mass": MASSES,
        "heads": draw(st.sampled_from(["mean_distribution", "none"])),
    }


def vectors(draw, generator, shape, dtype):
    """Normal numbers of any size, alike or apart, perhaps as a view of every second column."""
    view = draw(st.booleans())
    wide = (*shape[:-1], 2 * shape[-1]) if view else shape
    values = torch.randn(wide, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        values = values.round()  # ties
    if draw(st.booleans()):
        values = values * 1e-3 + values[..., :1, :]  # large scores, close together
    largest = torch.finfo(dtype).max
    values = (
        (values * min(draw(st.sampled_from(SIZES)), largest)).clamp(-largest, largest).to(dtype)
    )
    return values[..., ::2] if view else values
