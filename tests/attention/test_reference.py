"""The reference against a second specification: loops over single numbers in NumPy."""

import math

import numpy as np
import pytest
import torch

from tokenweights.attention import STATISTIC_KINDS, attention_statistics


def mean_distribution(query, key, real, row, slot, *, causal, window, softcap, sinks, scale):
    """Visible slots of one query, and the mean over heads of its weights on them."""
    heads, kv_heads = query.shape[1], key.shape[1]
    visible = [j for j in range(key.shape[2]) if real[row][j] and (j <= slot or not causal)]
    if window is not None:
        visible = visible[-window:]
    total = np.zeros(len(visible))
    for head in range(heads):
        q = query[row, head, slot - key.shape[2] + query.shape[2]]
        scores = [scale * float(q @ key[row, head * kv_heads // heads, j]) for j in visible]
        if softcap is not None:
            scores = [softcap * math.tanh(score / softcap) for score in scores]
        sink = [] if sinks is None else [sinks[head]]
        shift = max(scores + sink)
        denominator = sum(math.exp(score - shift) for score in scores + sink)
        total += np.array([math.exp(score - shift) for score in scores]) / denominator / heads
    return visible, total


def entropy(weights):
    share = weights[weights > 0] / weights.sum()
    return float(-(share * np.log(share)).sum())


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [None, (0.5, -1.0, 2.0, 0.0)])
@pytest.mark.parametrize("causal", [True, False])
def test_reference_agrees_with_loops_over_numbers(window, softcap, sinks, causal):
    if window is not None and not causal:
        return
    generator = np.random.default_rng(0)
    query, key = generator.normal(size=(3, 4, 6, 5)) * 2, generator.normal(size=(3, 2, 9, 5))
    real = np.ones((3, 9), dtype=bool)
    real[0, :4] = False  # left padding reaches into the queries
    real[1, 2] = real[1, 7:] = False  # a hole, and right padding
    statistics = attention_statistics(
        torch.tensor(query),
        torch.tensor(key),
        key_mask=torch.tensor(real),
        top_k=3,
        fixed_k=2,
        support_mass=(0.5, 0.9),
        local_window=2,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=None if sinks is None else torch.tensor(sinks),
        scale=0.7,
        backend="reference",
    )
    for row in range(3):
        for index in range(6):
            slot = index + 3
            found = {kind: getattr(statistics, kind)[row, index] for kind in STATISTIC_KINDS}
            if not real[row, slot]:
                assert all((value == 0).all() for value in found.values())
                continue
            visible, weights = mean_distribution(
                query,
                key,
                real,
                row,
                slot,
                causal=causal,
                window=window,
                softcap=softcap,
                sinks=sinks,
                scale=0.7,
            )
            share = weights / weights.sum()
            descending = np.sort(share)[::-1]
            distance = np.array(
                [abs(real[row, :slot].sum() - real[row, :j].sum()) for j in visible]
            )
            raw = entropy(weights)
            expected = {
                "raw": raw,
                "normalized": raw / math.log(len(visible)) if len(visible) > 1 else 0.0,
                "topk": entropy(descending[:3]),
                "fixed": entropy(weights[:2]),
                "mean_distance": (share * distance).sum(),
                "local_mass": share[distance < 2].sum(),
                "nonlocal_mass": share[distance >= 2].sum(),
                "max_weight": share.max(),
                "row_mass": weights.sum(),
            }
            for kind, value in expected.items():
                assert float(found[kind]) == pytest.approx(value, abs=1e-12), kind
            sizes = [1 + int((np.cumsum(descending) < mass).sum()) for mass in (0.5, 0.9)]
            assert found["support_size"].tolist() == sizes
