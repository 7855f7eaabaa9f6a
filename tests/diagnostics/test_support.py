"""Support concentration against NumPy, from attention matrices to group means."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks

import tokenweights as tw
from tokenweights import AttentionStatistics, TokenWeightsError

MASS = (0.5, 0.9)


def attention(query, key):
    """Head-averaged causal attention of one response, `query key`, in NumPy."""
    heads, tokens, dim = query.shape
    scores = np.einsum("hqd,hkd->hqk", query, np.repeat(key, heads // len(key), 0)) / dim**0.5
    scores[:, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).mean(0)


def support(row, mass):
    return int(np.searchsorted(np.sort(row)[::-1].cumsum(), mass)) + 1


@given(masks(max_token=9), st.integers(0, 1000), st.sampled_from(["deciding", "own"]))
def test_support_from_query_and_key_agrees_with_numpy(mask, seed, alignment):
    batch, response = mask.shape
    prompt = 3
    generator = np.random.default_rng(seed)
    query = generator.normal(size=(batch, 4, prompt + response, 5))
    key = generator.normal(size=(batch, 2, prompt + response, 5))
    statistics = tw.response_statistics(
        tw.attention_statistics(
            torch.tensor(query),
            torch.tensor(key),
            support_mass=MASS,
            local_window=3,
            backend="reference",
        ),
        response_length=response,
        alignment=alignment,
    )
    some = mask & (torch.arange(response) % 2 == 0)
    got = tw.support_concentration(statistics, [mask, some])
    matrices = [attention(*each) for each in zip(query, key, strict=True)]
    shift = prompt - (alignment == "deciding")
    for place, members in enumerate((mask, some)):
        rows = [(matrices[r][t + shift], t + shift) for r, t in members.nonzero().tolist()]
        assert got.count[place] == len(rows)
        if not rows:
            assert got.mean_distance[place].isnan()
            continue
        distance = [w @ np.abs(at - np.arange(len(w))) for w, at in rows]
        local = [w[max(at - 2, 0) : at + 1].sum() for w, at in rows]
        sizes = [[support(w, mass) for mass in MASS] for w, _ in rows]
        assert got.mean_distance[place].item() == pytest.approx(np.mean(distance), abs=1e-9)
        assert got.local_mass[place].item() == pytest.approx(np.mean(local), abs=1e-9)
        assert got.nonlocal_mass[place].item() == pytest.approx(1 - np.mean(local), abs=1e-9)
        np.testing.assert_allclose(got.support_size[place], np.mean(sizes, 0))


@given(masks(max_token=10), st.integers(0, 1000), st.integers(0, 10))
def test_support_by_entropy_groups_by_every_entropy(mask, seed, first):
    generator = torch.Generator().manual_seed(seed)
    kinds = ("raw", "normalized", "topk", "fixed")
    scores = {kind: torch.rand(mask.shape, generator=generator) for kind in kinds}
    distance = torch.rand(mask.shape, generator=generator)
    statistics = AttentionStatistics(**scores, mean_distance=distance)
    head = tw.first_tokens(mask, count=first)
    got = tw.support_by_entropy(statistics, head, fraction=0.3)
    assert tuple(got) == kinds
    for kind in kinds:
        chosen = [[], [], []]
        for row in range(len(mask)):
            valid = np.flatnonzero(mask[row].numpy())[:first]
            order = valid[np.argsort(scores[kind][row].numpy()[valid], kind="stable")]
            k = math.ceil(round(0.3 * len(order), 9))
            for group, tokens in zip(
                chosen, (order, order[:k], order[len(order) - k :]), strict=True
            ):
                group += distance[row].double().numpy()[tokens].tolist()
        for place, values in enumerate(chosen):
            assert got[kind].count[place] == len(values)
            if values:
                mean = got[kind].mean_distance[place].item()
                assert mean == pytest.approx(np.mean(values), abs=1e-12)


def test_heads_keep_an_axis():
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    kinds = ("support_size", "local_mass")
    heads = tw.attention_statistics(query, key, kinds=kinds, heads="none", local_window=3)
    mask = torch.rand(2, 9) < 0.7
    got = tw.support_concentration(heads, [mask])
    assert got.support_size.shape == (1, 4, 4) and got.local_mass.shape == (1, 4)
    for head in range(4):
        alone = AttentionStatistics(
            support_size=heads.support_size[:, head], local_mass=heads.local_mass[:, head]
        )
        expected = tw.support_concentration(alone, [mask])
        torch.testing.assert_close(got.support_size[:, head], expected.support_size)
        torch.testing.assert_close(got.local_mass[:, head], expected.local_mass)


@pytest.mark.parametrize("alignment", ["deciding", "own"])
@pytest.mark.parametrize("heads", [(), (3,)])
def test_response_statistics_align_every_field_as_scores(alignment, heads):
    raw = torch.rand(2, *heads, 7)
    sizes = torch.randint(1, 9, (2, *heads, 7, 2))
    prompt_length = torch.tensor([2, 4])
    align = tw.align_to_decision if alignment == "deciding" else tw.align_to_own
    for lengths in (None, prompt_length):
        options = {"response_length": 3, "prompt_length": lengths}
        got = tw.response_statistics(
            AttentionStatistics(raw=raw, support_size=sizes), alignment=alignment, **options
        )
        for head in range(*heads) if heads else [slice(None)]:
            at = (slice(None), head) if heads else (slice(None),)
            assert torch.equal(got.raw[at], align(raw[at], **options))
            for mass in range(2):
                expected = align(sizes[(*at, ..., mass)].float(), **options)
                assert torch.equal(got.support_size[(*at, ..., mass)].float(), expected)


def test_values_off_the_groups_do_not_count():
    mask = torch.tensor([[True, False]])
    statistics = AttentionStatistics(mean_distance=torch.tensor([[2.0, math.nan]]))
    assert tw.support_concentration(statistics, [mask]).mean_distance.item() == 2.0


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda m: tw.support_concentration(AttentionStatistics(), [m]), "none of them"),
        (lambda m: tw.support_concentration(AttentionStatistics(), []), "groups"),
        (
            lambda m: tw.support_concentration(
                AttentionStatistics(mean_distance=torch.rand(1, 3)), [m]
            ),
            "2 tokens",
        ),
        (
            lambda m: tw.support_concentration(
                AttentionStatistics(local_mass=torch.full((1, 2), math.nan)), [m]
            ),
            "finite",
        ),
        (
            lambda m: tw.support_by_entropy(AttentionStatistics(local_mass=torch.rand(1, 2)), m),
            "entropy",
        ),
        (
            lambda m: tw.support_by_entropy(
                AttentionStatistics(raw=torch.rand(1, 4, 2), local_mass=torch.rand(1, 4, 2)), m
            ),
            "without heads",
        ),
        (
            lambda m: tw.response_statistics(AttentionStatistics(), response_length=1),
            "Measure",
        ),
    ],
)
def test_nonsense_is_refused(run, message):
    with pytest.raises(TokenWeightsError, match=message):
        run(torch.ones(1, 2).bool())
