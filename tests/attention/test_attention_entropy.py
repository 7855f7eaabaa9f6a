import dataclasses
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import attention_inputs, lengths, normal

from tokenweights import TokenWeightsError
from tokenweights.attention import (
    ENTROPY_KINDS,
    STATISTIC_KINDS,
    attention_entropy,
    attention_entropy_varlen,
    attention_statistics,
    chunked,
    dispatch,
)
from tokenweights.attention.chunked import sequence_statistics
from tokenweights.attention.statistics import Logits, Request

HEADS = ("mean_distribution", "mean_entropy", "none")
TOLERANCE = 1e-5
MASSES = (0.5, 0.8, 0.9, 0.95)


def assert_close(actual, expected, tolerance=TOLERANCE):
    error = (actual.double() - expected.double()).abs() / expected.double().abs().clamp_min(1.0)
    assert error.numel() == 0 or float(error.max()) <= tolerance


def log_sum_exp(query, key, *, sinks=None, scale=None, window=None):
    """Causal softmax denominators of unpadded queries and keys."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.double() @ key.double().transpose(-1, -2) * scale
    queries, keys = scores.shape[-2:]
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    if window is not None:
        hidden |= torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries - window)
    lse = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[None, :, None])
    return lse.float()


# Closed forms.


def test_two_heads_that_disagree_have_entropy_log_2_together_and_0_alone():
    # Head 0 looks at key 0, head 1 at key 1: each is certain, their mean is a fair coin.
    key = torch.eye(2)[None, None].expand(1, 2, 2, 2)
    query = 200 * torch.eye(2)[None, :, None].expand(1, 2, 2, 2)
    arguments = {"scale": 1.0, "kind": "raw"}
    assert_close(attention_entropy(query, key, **arguments)[0, 1], torch.tensor(math.log(2)))
    per_head = attention_entropy(query, key, heads="none", **arguments)
    assert per_head.shape == (1, 2, 2)
    assert_close(per_head, torch.zeros(1, 2, 2))
    assert_close(
        attention_entropy(query, key, heads="mean_entropy", **arguments), torch.zeros(1, 2)
    )


def test_known_weights_give_the_entropies_of_the_paper():
    # One query with weights 1/2, 1/4, 1/8, 1/8 on four keys.
    weights = torch.tensor([0.5, 0.25, 0.125, 0.125])
    key = torch.zeros(1, 1, 4, 2)
    key[0, 0, :, 0] = weights.log()
    query = torch.tensor([1.0, 0.0]).expand(1, 1, 1, 2)
    entropy = {
        kind: float(attention_entropy(query, key, kind=kind, scale=1.0, top_k=2, fixed_k=3))
        for kind in ENTROPY_KINDS
    }
    two_thirds = math.log(3) - 2 / 3 * math.log(2)
    assert entropy["raw"] == pytest.approx(1.75 * math.log(2), abs=1e-6)
    assert entropy["normalized"] == pytest.approx(1.75 / 2, abs=1e-6)
    assert entropy["topk"] == pytest.approx(two_thirds, abs=1e-6)
    support = attention_statistics(
        query, key, kinds=("support_size",), scale=1.0, support_mass=(0.4, 0.6, 0.8, 0.95, 1.0)
    )
    assert support.support_size.tolist() == [[[1, 2, 3, 4, 4]]]
    first_three = torch.tensor([4.0, 2.0, 1.0]) / 7
    assert entropy["fixed"] == pytest.approx(float(torch.special.entr(first_three).sum()), abs=1e-6)


def test_one_visible_key_has_entropy_zero():
    query, key = normal(1, 2, 5, 4), normal(1, 2, 5, 4, seed=1)
    for kind in ENTROPY_KINDS:
        assert float(attention_entropy(query, key, kind=kind)[0, 0]) == 0.0
        assert attention_entropy(query, key, kind=kind, window=1).tolist() == [[0.0] * 5]


def test_sink_takes_mass_and_the_rest_is_renormalised():
    # Two equal keys and a sink with the same logit: a third each, so the visible half is even.
    query, key = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 2, 4)
    statistics = attention_statistics(query, key, sinks=torch.zeros(1))
    assert float(statistics.row_mass) == pytest.approx(2 / 3, abs=1e-6)
    assert float(statistics.raw) == pytest.approx(math.log(2), abs=1e-6)
    assert float(statistics.max_weight) == pytest.approx(0.5, abs=1e-6)


def test_mean_entropy_is_the_mean_of_the_entropies_of_the_heads():
    query, key = normal(2, 4, 6, 8), normal(2, 2, 6, 8, seed=1)
    for kind in ENTROPY_KINDS:
        per_head = attention_entropy(query, key, kind=kind, heads="none", top_k=3, fixed_k=3)
        mean = attention_entropy(query, key, kind=kind, heads="mean_entropy", top_k=3, fixed_k=3)
        assert_close(mean, per_head.mean(1))


def test_softcap_bounds_the_scores():
    key = torch.tensor([[1.0], [0.0]])[None, None]
    query = torch.full((1, 1, 1, 1), 1e4)
    share = torch.tensor([1.0, 0.0]).softmax(0)  # 1 * tanh(1e4) = 1
    entropy = attention_entropy(query, key, kind="raw", softcap=1.0, scale=1.0)
    assert_close(entropy, torch.special.entr(share).sum().expand(1, 1))


def test_statistics_of_equal_weights_are_counted_by_hand():
    query, key = torch.zeros(1, 2, 10, 4), torch.zeros(1, 1, 10, 4)
    statistics = attention_statistics(query, key, local_window=3, support_mass=(0.25, 1.0))
    count = torch.arange(1, 11)
    assert_close(statistics.mean_distance[0], (count - 1) / 2)
    assert_close(statistics.local_mass[0], count.clamp_max(3) / count)
    assert_close(statistics.nonlocal_mass[0], (count - 3).clamp_min(0) / count)
    assert_close(statistics.max_weight[0], 1 / count)
    assert_close(statistics.row_mass[0], torch.ones(10))
    sizes = torch.stack([(count / 4).ceil().long(), count], -1)
    assert (statistics.support_size[0] - sizes).abs().max() <= 1
    # Keys after the query have no weight at all, not merely a small one.
    assert statistics.mean_distance[0, 0] == 0.0


# Agreement with the float64 reference.


@settings(deadline=None, max_examples=120)
@given(attention_inputs(), st.sampled_from(HEADS))
def test_entropies_agree_with_the_reference(inputs, heads):
    query, key, arguments = inputs
    for kind in ENTROPY_KINDS:
        actual = attention_entropy(query, key, kind=kind, heads=heads, **arguments)
        expected = attention_entropy(
            query, key, kind=kind, heads=heads, backend="reference", **arguments
        )
        assert actual.dtype == torch.float32 and expected.dtype == torch.float64
        assert actual.shape == expected.shape
        assert_close(actual, expected)


@settings(deadline=None, max_examples=80)
@given(attention_inputs(), st.sampled_from(["mean_distribution", "none"]), st.integers(1, 50))
def test_statistics_agree_with_the_reference(inputs, heads, local_window):
    query, key, arguments = inputs
    arguments |= {"heads": heads, "local_window": local_window}
    actual = attention_statistics(query, key, **arguments)
    expected = attention_statistics(query, key, backend="reference", **arguments)
    for kind in STATISTIC_KINDS:
        value, wanted = getattr(actual, kind), getattr(expected, kind)
        assert value.shape == wanted.shape
        if kind == "support_size":
            # The cumulative mass may meet a threshold within rounding.
            assert (value - wanted).abs().max() <= 1
        else:
            assert_close(value, wanted)


@settings(deadline=None, max_examples=40)
@given(attention_inputs(), st.sampled_from(ENTROPY_KINDS), st.sampled_from(HEADS))
def test_entropy_stays_in_its_range(inputs, kind, heads):
    query, key, arguments = inputs
    entropy = attention_entropy(query, key, kind=kind, heads=heads, **arguments)
    most = {"raw": key.shape[2], "topk": arguments["top_k"], "fixed": arguments["fixed_k"]}
    bound = 1.0 if kind == "normalized" else float(torch.tensor(float(most[kind])).log())
    assert float(entropy.min()) >= 0.0
    assert float(entropy.max()) <= bound


def test_peaked_distributions_agree_with_the_reference():
    # Most weights are far below what float32 can hold.
    query, key = normal(1, 4, 200, 16) * 60, normal(1, 2, 200, 16, seed=1)
    for heads in HEADS:
        for kind in ENTROPY_KINDS:
            arguments = {"kind": kind, "heads": heads, "fixed_k": 5, "top_k": 5}
            actual = attention_entropy(query, key, **arguments)
            expected = attention_entropy(query, key, backend="reference", **arguments)
            assert_close(actual, expected, 1e-4)


def test_first_keys_without_representable_mass_still_have_an_entropy():
    # Every query looks at key 2 with a lead of 400 nats; keys 0 and 1 have odds 1 : 3.
    key = torch.zeros(1, 1, 6, 2)
    key[0, 0, :, 0] = torch.tensor([0.0, math.log(3), 400.0, 0.0, 0.0, 0.0])
    query = torch.tensor([1.0, 0.0]).expand(1, 2, 6, 2)
    expected = float(torch.special.entr(torch.tensor([0.25, 0.75])).sum())
    for heads in ("mean_distribution", "mean_entropy"):
        entropy = attention_entropy(query, key, kind="fixed", fixed_k=2, scale=1.0, heads=heads)
        assert_close(entropy[0, 2:], torch.full((4,), expected))
    windowed = attention_entropy(query, key, kind="fixed", fixed_k=2, scale=1.0, window=4)
    reference = attention_entropy(
        query, key, kind="fixed", fixed_k=2, scale=1.0, window=4, backend="reference"
    )
    assert_close(windowed, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_long_rows_agree_with_the_reference(dtype, spread):
    tokens = 4096
    query = (normal(1, 4, tokens, 16) * spread).to(dtype)
    key = normal(1, 2, tokens, 16, seed=1).to(dtype)
    actual = attention_statistics(query, key)
    for row in (0, 1, 127, 128, 1000, 2047, tokens - 1):
        expected = attention_statistics(
            query[:, :, row : row + 1], key[:, :, : row + 1], backend="reference"
        )
        for kind in STATISTIC_KINDS:
            value, wanted = getattr(actual, kind)[:, row], getattr(expected, kind)[:, 0]
            if kind == "support_size":
                assert int((value - wanted).abs().max()) <= 1
            else:
                assert_close(value, wanted, 5e-6)


def test_long_rows_of_equal_weights_agree_with_the_reference():
    query, key = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4096, 8)
    actual, expected = (
        attention_statistics(query, key, backend=backend) for backend in ("chunked", "reference")
    )
    for kind in ("raw", "normalized", "topk", "fixed"):
        assert_close(getattr(actual, kind), getattr(expected, kind), 5e-6)
    # 0.9 * 4093 lies between two integers; 0.5 * 4096 is one.
    assert int((actual.support_size - expected.support_size).abs().max()) <= 1


@pytest.mark.parametrize("missing", [False, True])
def test_support_sizes_with_and_without_numpy(monkeypatch, missing):
    query, key = normal(1, 2, 30, 8), normal(1, 2, 80, 8, seed=1)
    if missing:

        def refusal(tensor):
            raise RuntimeError("Numpy is not available")

        monkeypatch.setattr(torch.Tensor, "numpy", refusal)
    statistics = attention_statistics(query, key, top_k=9, support_mass=MASSES)
    monkeypatch.undo()
    expected = attention_statistics(query, key, top_k=9, backend="reference")
    assert_close(statistics.topk, expected.topk)
    fewest, most = (  # the sizes of thresholds that differ by the rounding of a cumulative mass
        attention_statistics(query, key, support_mass=masses, backend="reference").support_size
        for masses in ([m - TOLERANCE for m in MASSES], [m + TOLERANCE for m in MASSES])
    )
    assert ((fewest <= statistics.support_size) & (statistics.support_size <= most)).all()


@pytest.mark.parametrize("workspace_bytes", [1, 20_000])
def test_bounded_workspace_changes_nothing(workspace_bytes):
    query, key = normal(2, 4, 60, 8), normal(2, 2, 90, 8, seed=1)
    actual = attention_statistics(query, key, workspace_bytes=workspace_bytes)
    expected = attention_statistics(query, key, backend="reference")
    for kind in ENTROPY_KINDS:
        assert_close(getattr(actual, kind), getattr(expected, kind))
    assert int((actual.support_size - expected.support_size).abs().max()) <= 1


# Layout.


@settings(deadline=None, max_examples=40)
@given(
    lengths(max_token=150),
    st.data(),
    st.sampled_from(ENTROPY_KINDS),
    st.sampled_from(HEADS),
    st.sampled_from([None, 9]),
)
def test_every_layout_gives_the_same_numbers(lengths, data, kind, heads, window):
    queries = [data.draw(st.integers(1, length)) for length in lengths]
    arguments = {"kind": kind, "heads": heads, "window": window, "top_k": 5, "fixed_k": 5}
    tokens = [
        (normal(1, 4, count, 8, seed=row), normal(1, 2, length, 8, seed=100 + row))
        for row, (count, length) in enumerate(zip(queries, lengths, strict=True))
    ]
    alone = [attention_entropy(q, k, **arguments)[0] for q, k in tokens]

    longest = max(lengths)
    left_query = torch.full((len(lengths), 4, longest, 8), torch.nan)
    left_key = torch.full((len(lengths), 2, longest, 8), torch.nan)
    right_query, right_key = left_query.clone(), left_key.clone()
    left_mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    right_mask = left_mask.clone()
    for row, ((q, k), length) in enumerate(zip(tokens, lengths, strict=True)):
        # Padded queries cover all positions, so those before the given ones are made up.
        whole = torch.cat([torch.zeros(4, length - q.shape[2], 8), q[0]], dim=1)
        left_query[row, :, longest - length :], left_key[row, :, longest - length :] = whole, k[0]
        right_query[row, :, :length], right_key[row, :, :length] = whole, k[0]
        left_mask[row, longest - length :], right_mask[row, :length] = True, True
    left = attention_entropy(left_query, left_key, key_mask=left_mask, **arguments)
    right = attention_entropy(right_query, right_key, key_mask=right_mask, **arguments)
    packed = attention_entropy_varlen(
        torch.cat([q[0].transpose(0, 1) for q, _ in tokens]),
        torch.cat([k[0].transpose(0, 1) for _, k in tokens]),
        cu_seqlens_q=torch.tensor([0, *queries]).cumsum(0),
        cu_seqlens_k=torch.tensor([0, *lengths]).cumsum(0),
        **arguments,
    )
    assert torch.equal(packed, torch.cat(alone, dim=-1))
    for row, (count, length) in enumerate(zip(queries, lengths, strict=True)):
        assert torch.equal(left[row][..., longest - length :], right[row][..., :length])
        assert not left[row][..., : longest - length].any()
        assert not right[row][..., length:].any()
        # Blocks of rows start elsewhere, so only rounding may differ.
        assert_close(left[row][..., longest - count :], alone[row], 2e-6)


def packed(sequences):
    """Queries, keys and their bounds, of sequences `1 heads token dim` one after another."""
    queries, keys = zip(*sequences, strict=True)
    tokens = [torch.cat([part[0].transpose(0, 1) for part in side]) for side in (queries, keys)]
    bounds = [torch.tensor([0, *(p.shape[2] for p in side)]).cumsum(0) for side in (queries, keys)]
    return tokens, dict(zip(("cu_seqlens_q", "cu_seqlens_k"), bounds, strict=True))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from([1, 2, 16, 45]), min_size=2, max_size=12),
    st.sampled_from([None, 1, 3]),
    st.sampled_from(ENTROPY_KINDS),
    st.sampled_from(HEADS),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2**28]),
)
def test_short_sequences_of_equal_lengths_are_as_alone(
    sizes, queries, kind, heads, faint, with_lse, workspace_bytes
):
    # A sink far above the scores sends rows through their logarithms.
    sinks = torch.tensor([90.0, 1.0, 80.0, -torch.inf]) if faint else None
    arguments = {"kind": kind, "heads": heads, "sinks": sinks, "top_k": 5, "fixed_k": 5}
    arguments["workspace_bytes"] = workspace_bytes
    sequences = [
        (
            normal(1, 4, min(queries or size, size), 8, seed=row),
            normal(1, 2, size, 8, seed=100 + row),
        )
        for row, size in enumerate(sizes)
    ]
    lse = [log_sum_exp(*pair, sinks=sinks) if with_lse else None for pair in sequences]
    alone = [
        attention_entropy(*pair, lse=own, **arguments)[0]
        for pair, own in zip(sequences, lse, strict=True)
    ]
    (query, key), bounds = packed(sequences)
    together = torch.cat([own[0] for own in lse], -1) if with_lse else None
    found = attention_entropy_varlen(query, key, lse=together, **bounds, **arguments)
    assert torch.equal(found, torch.cat(alone, -1))


def test_short_sequences_share_calls(monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(options["sequences"])
        return sequence_statistics(*arguments, **options)

    monkeypatch.setattr(dispatch, "sequence_statistics", counted)
    sizes = [16, 9] * 300
    (query, key), bounds = packed(
        [(normal(1, 4, size, 8, seed=size), normal(1, 2, size, 8)) for size in sizes]
    )
    attention_entropy_varlen(query, key, **bounds)
    # 2**20 bytes hold 256 sequences of 16 tokens, and all those of 9.
    assert calls == [256, 44, 300]


@pytest.mark.parametrize("kind", ENTROPY_KINDS)
def test_a_foreign_lse_among_short_sequences_is_refused(kind):
    sequences = [
        (normal(1, 4, 9, 8, seed=row), normal(1, 2, 9, 8, seed=50 + row)) for row in range(8)
    ]
    (query, key), bounds = packed(sequences)
    lse = torch.cat([log_sum_exp(*pair)[0] for pair in sequences], -1)
    arguments = {"kind": kind, "fixed_k": 4, **bounds}
    attention_entropy_varlen(query, key, lse=lse, **arguments)
    lse[:, 5 * 9 : 6 * 9] += 0.1
    with pytest.raises(TokenWeightsError, match="does not belong to these q and k"):
        attention_entropy_varlen(query, key, lse=lse, **arguments)


def test_packed_reference_and_chunked_agree():
    query, key = normal(7, 4, 8), normal(12, 2, 8, seed=1)
    arguments = {
        "cu_seqlens_q": torch.tensor([0, 3, 3, 7]),
        "cu_seqlens_k": torch.tensor([0, 5, 6, 12]),
        "kind": "raw",
    }
    for heads in HEADS:
        actual = attention_entropy_varlen(query, key, heads=heads, **arguments)
        expected = attention_entropy_varlen(
            query, key, heads=heads, backend="reference", **arguments
        )
        assert_close(actual, expected)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 200), st.integers(1, 10**6), st.booleans())
def test_block_size_changes_nothing_but_rounding(rows, workspace_bytes, per_head):
    query, key = normal(4, 90, 8), normal(2, 130, 8, seed=1)
    request = Request(STATISTIC_KINDS, top_k=5, fixed_k=5, support_mass=(0.5,))
    logits = Logits(scale=0.5, window=40)
    whole = sequence_statistics(query, key, request, logits, rows=90, per_head=per_head)
    parts = sequence_statistics(
        query,
        key,
        request,
        logits,
        rows=rows,
        workspace_bytes=workspace_bytes,
        per_head=per_head,
    )
    for kind in STATISTIC_KINDS:
        if kind == "support_size":
            assert (whole[kind] - parts[kind]).abs().max() <= 1
        else:
            assert_close(parts[kind], whole[kind], 2e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("heads_per_tile", [1, 2, 3, 5, 7])
def test_tile_size_changes_nothing_but_rounding(monkeypatch, kv_heads, heads_per_tile):
    query, key = normal(1, 12, 40, 8), normal(1, kv_heads, 40, 8, seed=1)
    # Scores of mixed size: some heads need the shift by the largest score, some do not.
    if kv_heads == 1:
        query[:, ::2] *= 40
    else:
        key[:, 0] *= 40
    sinks = normal(12, seed=2)
    expected = attention_entropy(query, key, sinks=sinks, backend="reference")
    monkeypatch.setattr(chunked, "CPU_TILE_BYTES", heads_per_tile * 40 * 40 * 4)
    assert_close(attention_entropy(query, key, sinks=sinks), expected)
    lse = log_sum_exp(query, key, sinks=sinks)
    assert_close(attention_entropy(query, key, sinks=sinks, lse=lse), expected)


@pytest.mark.parametrize("lead", [20.0, 60.0, 200.0])
@pytest.mark.parametrize("size", [0.1, 10.0])
@pytest.mark.parametrize("heads", ["mean_distribution", "none"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_sinks_far_above_the_scores_leave_the_entropies_exact(lead, size, heads, with_lse):
    query, key = normal(1, 2, 20, 8) * size, normal(1, 2, 20, 8, seed=1)
    sinks = log_sum_exp(query, key).amax((0, 2)) + lead
    arguments = {"sinks": sinks, "heads": heads, "top_k": 3, "fixed_k": 3, "local_window": 4}
    expected = attention_statistics(query, key, backend="reference", **arguments)
    lse = log_sum_exp(query, key, sinks=sinks) if with_lse else None
    actual = attention_statistics(query, key, lse=lse, **arguments)
    for kind in STATISTIC_KINDS:
        if kind == "support_size":
            assert (actual.support_size - expected.support_size).abs().max() <= 1
        else:
            assert_close(getattr(actual, kind), getattr(expected, kind), 1e-4)


def test_sink_in_one_head_only_silences_that_head():
    query, key = normal(1, 2, 20, 8), normal(1, 2, 20, 8, seed=1)
    entropy = attention_entropy(query, key, sinks=torch.tensor([0.0, 300.0]))
    assert_close(entropy, attention_entropy(query[:, :1], key[:, :1]))


def test_batch_row_without_real_keys_is_zero():
    query, key = normal(2, 2, 3, 4), normal(2, 2, 3, 4, seed=1)
    mask = torch.tensor([[True] * 3, [False] * 3])
    for backend in ("chunked", "reference"):
        entropy = attention_entropy(query, key, key_mask=mask, backend=backend)
        assert entropy[0, 1:].all() and not entropy[1].any()
    nothing = torch.zeros_like(mask)
    assert not attention_entropy(query, key, key_mask=nothing).any()


def test_no_queries_give_an_empty_result():
    assert attention_entropy(normal(2, 2, 0, 4), normal(2, 2, 3, 4)).shape == (2, 0)
    assert attention_entropy(normal(0, 2, 3, 4), normal(0, 2, 3, 4)).shape == (0, 3)


def test_result_carries_no_gradient():
    query, key = normal(1, 2, 3, 4).requires_grad_(), normal(1, 2, 3, 4).requires_grad_()
    assert not attention_entropy(query, key).requires_grad


def test_inputs_are_left_as_they_were():
    query, key, mask = normal(1, 2, 3, 4), normal(1, 2, 3, 4), torch.tensor([[False, True, True]])
    before = query.clone(), key.clone()
    attention_statistics(query, key, key_mask=mask, softcap=2.0)
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])


# Known denominators.


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(ENTROPY_KINDS),
    st.sampled_from(HEADS),
    st.booleans(),
    st.sampled_from([1, 20, 300]),
    st.integers(1, 200),
    st.sampled_from([None, 60]),
)
@example("fixed", "mean_distribution", True, 20, 200, None)
@example("fixed", "mean_distribution", False, 20, 200, 60)
def test_lse_gives_the_same_entropies(kind, heads, with_sinks, fixed_k, queries, window):
    query, key = normal(2, 4, queries, 8), normal(2, 2, 200, 8, seed=1)
    sinks = normal(4, seed=2) if with_sinks else None
    arguments = {"kind": kind, "heads": heads, "sinks": sinks, "fixed_k": fixed_k, "top_k": 20}
    arguments["window"] = window
    lse = log_sum_exp(query, key, sinks=sinks, window=window)
    actual = attention_entropy(query, key, lse=lse, **arguments)
    assert_close(actual, attention_entropy(query, key, backend="reference", **arguments))


@pytest.mark.parametrize("kind", ENTROPY_KINDS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_lse_of_other_queries_is_refused(kind, heads, with_sinks):
    query, key = normal(1, 4, 40, 8), normal(1, 2, 40, 8, seed=1)
    sinks = normal(4, seed=2) if with_sinks else None
    foreign = log_sum_exp(query, key, sinks=sinks, scale=0.4)
    arguments = {"kind": kind, "heads": heads, "sinks": sinks, "fixed_k": 4}
    for lse in (foreign, torch.full_like(foreign, torch.nan)):
        with pytest.raises(TokenWeightsError, match="does not belong to these q and k"):
            attention_entropy(query, key, lse=lse, **arguments)


def test_lse_is_read_at_real_queries_only():
    query, key = normal(1, 2, 6, 4), normal(1, 2, 6, 4, seed=1)
    mask = torch.tensor([[False, False, True, True, True, True]])
    lse = torch.full((1, 2, 6), torch.nan)
    lse[:, :, 2:] = log_sum_exp(query[:, :, 2:], key[:, :, 2:])
    actual = attention_entropy(query, key, key_mask=mask, lse=lse)
    assert_close(actual, attention_entropy(query, key, key_mask=mask))


# One sweep.


def test_statistics_hold_what_was_asked_for_and_nothing_else():
    query, key = normal(1, 2, 5, 4), normal(1, 2, 5, 4, seed=1)
    everything = attention_statistics(query, key)
    for kind in STATISTIC_KINDS:
        statistics = attention_statistics(query, key, kinds=(kind,))
        # A kernel may be another where more is asked for, so only rounding may differ.
        assert_close(getattr(statistics, kind), getattr(everything, kind), 2e-6)
        given = [
            f.name
            for f in dataclasses.fields(statistics)
            if getattr(statistics, f.name) is not None
        ]
        assert given == [kind]


def test_entropy_is_the_statistic_of_the_same_name():
    query, key = normal(2, 4, 50, 8), normal(2, 2, 60, 8, seed=1)
    for kind in ENTROPY_KINDS:
        statistics = attention_statistics(query, key, kinds=(kind,), top_k=7, fixed_k=9)
        entropy = attention_entropy(query, key, kind=kind, top_k=7, fixed_k=9)
        assert torch.equal(getattr(statistics, kind), entropy)
