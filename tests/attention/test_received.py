"""Columns of the attention matrix and the distances of its rows, on every layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import attention_inputs, lengths, normal

from tokenweights import TokenWeightsError
from tokenweights.attention import (
    HeadClasses,
    Received,
    attention_distance,
    attention_received,
    attention_received_varlen,
    attention_statistics,
    head_classes,
    received_chunked,
)

REDUCTIONS = ("mean", "sum", "max")
HORIZONS = [(None, None), (0, None), (1, None), (None, 3), (2, 9), (10, 50), (40, 40), (300, None)]


def assert_close(actual, expected, tolerance=1e-5):
    error = (actual.double() - expected.double()).abs() / expected.double().abs().clamp_min(1.0)
    assert actual.shape == expected.shape
    assert error.numel() == 0 or float(error.max()) <= tolerance


def dense_maps(query, key, *, window=None):
    """Causal attention of every head, `batch heads query key`, in float64."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.double() @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    queries, keys = scores.shape[-2:]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1), distance


# Worked by hand.


def test_equal_scores_give_each_key_a_share_of_every_later_query():
    query, key = torch.zeros(1, 4, 4, 8), torch.zeros(1, 2, 4, 8)
    found = {
        reduction: attention_received(query, key, reduction=reduction)[0]
        for reduction in REDUCTIONS
    }
    sums = torch.tensor([1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4])
    torch.testing.assert_close(found["sum"], sums)
    torch.testing.assert_close(found["mean"], sums / torch.tensor([4.0, 3.0, 2.0, 1.0]))
    torch.testing.assert_close(found["max"], torch.tensor([1, 1 / 2, 1 / 3, 1 / 4]))


def test_a_horizon_counts_the_queries_at_its_distances():
    query, key = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
    found = attention_received(query, key, horizon=(1, 2))[0]
    # Of key 2 only query 3 is in reach, of key 3 none.
    expected = [(1 / 2 + 1 / 3) / 2, (1 / 3 + 1 / 4) / 2, 1 / 4, 0.0]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_window_hides_a_key_from_queries_that_count_nevertheless():
    query, key = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
    found = attention_received(query, key, window=2, horizon=(1, 2))[0]
    torch.testing.assert_close(found, torch.tensor([1 / 4, 1 / 4, 1 / 2, 0.0]))


def test_a_sink_keeps_its_share():
    query, key = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8)
    found = attention_received(query, key, sinks=torch.zeros(1), reduction="sum")
    torch.testing.assert_close(found, torch.tensor([[1 / 2 + 1 / 3, 1 / 3]]))


def test_only_the_queries_that_are_asked_count():
    query, key = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
    rows = torch.tensor([[False, True, False, True]])
    found = attention_received(query, key, rows=rows)[0]
    torch.testing.assert_close(found, torch.tensor([3 / 8, 3 / 8, 1 / 4, 1 / 4]))


def test_distances_are_bounded_pair_by_pair():
    query, key = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
    torch.testing.assert_close(attention_distance(query, key)[0], torch.tensor([0, 0.5, 1, 1.5]))
    found = attention_distance(query, key, bound=2)[0]
    torch.testing.assert_close(found, torch.tensor([0, 1 / 2, 1, 5 / 4]))


def test_heads_are_classed_by_their_mean_distance_over_valid_queries():
    distances = torch.tensor([[[1.0, 90.0], [8.0, 0.0], [5.0, 0.0], [2.0, 0.0]]])
    mask = torch.tensor([[True, False]])
    assert head_classes(distances, mask) == HeadClasses(local=(0,), distant=(1,))
    assert head_classes(distances, mask, share=0.5) == HeadClasses((0, 3), (1, 2))
    assert head_classes(distances[:, :1], mask) == HeadClasses((0,), (0,))
    ties = head_classes(torch.zeros(1, 4, 2), mask, share=0.25)
    assert ties == HeadClasses((0,), (3,))
    with pytest.raises(TokenWeightsError, match="True query"):
        head_classes(distances, ~mask & mask)
    with pytest.raises(TokenWeightsError, match="share"):
        head_classes(distances, mask, share=0.6)


# Agreement.


@settings(deadline=None, max_examples=120)
@given(
    attention_inputs(),
    st.sampled_from(HORIZONS),
    st.sampled_from(REDUCTIONS),
    st.sampled_from(["mean_distribution", "none", "some"]),
    st.sampled_from([None, 0.0, 0.3, 1.0]),
)
def test_received_agrees_with_the_reference(inputs, horizon, reduction, heads, asked):
    query, key, arguments = inputs
    arguments = {name: arguments[name] for name in arguments if name not in ("top_k", "fixed_k")}
    if heads == "some":
        heads = list(range(0, query.shape[1], 2))
    arguments |= {"horizon": horizon, "reduction": reduction, "heads": heads}
    if asked is not None:
        arguments["rows"] = torch.rand(query.shape[0], query.shape[2]) < asked
    actual = attention_received(query, key, **arguments)
    expected = attention_received(query, key, backend="reference", **arguments)
    assert actual.dtype == torch.float32 and expected.dtype == torch.float64
    assert_close(actual, expected)


@settings(deadline=None, max_examples=60)
@given(
    attention_inputs(),
    st.sampled_from([None, 1, 10, 1000]),
    st.sampled_from(["mean_distribution", "none", "some"]),
)
def test_distances_agree_with_the_reference(inputs, bound, heads):
    query, key, arguments = inputs
    arguments = {name: arguments[name] for name in arguments if name not in ("top_k", "fixed_k")}
    heads = list(range(0, query.shape[1], 2)) if heads == "some" else heads
    arguments |= {"bound": bound, "heads": heads}
    actual = attention_distance(query, key, **arguments)
    assert_close(actual, attention_distance(query, key, backend="reference", **arguments))


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("horizon", HORIZONS)
def test_the_reference_agrees_with_dense_maps(horizon, window):
    query, key = normal(2, 4, 60, 8) * 2, normal(2, 2, 80, 8, seed=1)
    maps, distance = dense_maps(query, key, window=window)
    first, last = horizon
    counted = distance >= (first or 0)
    if last is not None:
        counted &= distance <= last
    weights = maps * counted
    for heads in ("mean_distribution", "none", [1, 2]):
        own = {"mean_distribution": weights.mean(1), "none": weights}.get(str(heads))
        own = weights[:, [1, 2]].mean(1) if own is None else own
        expected = {
            "sum": own.sum(-2),
            "mean": own.sum(-2) / counted.sum(0).clamp_min(1),
            "max": own.amax(-2),
        }
        for reduction in REDUCTIONS:
            for backend in ("reference", "chunked"):
                found = attention_received(
                    query,
                    key,
                    horizon=horizon,
                    reduction=reduction,
                    heads=heads,
                    window=window,
                    backend=backend,
                )
                assert_close(found, expected[reduction], 2e-6)
    far = (maps.mean(1) * distance.clamp(max=10)).sum(-1)
    assert_close(attention_distance(query, key, bound=10, window=window), far, 5e-6)


@pytest.mark.parametrize("size", [20.0, 60.0])
@pytest.mark.parametrize("sink", [None, 60.0, 500.0])
def test_peaked_rows_and_sinks_agree_with_the_reference(size, sink):
    query, key = normal(1, 4, 200, 16) * size, normal(1, 2, 200, 16, seed=1)
    sinks = None if sink is None else torch.tensor([sink, 0.0, -5.0, sink])
    for heads in ("mean_distribution", "none"):
        for horizon in HORIZONS:
            options = {"heads": heads, "horizon": horizon, "sinks": sinks}
            expected = attention_received(query, key, backend="reference", **options)
            assert_close(attention_received(query, key, **options), expected)


@pytest.mark.parametrize("heads", ["mean_distribution", "none"])
def test_known_denominators_change_nothing(heads):
    query, key = normal(2, 4, 40, 8), normal(2, 2, 90, 8, seed=1)
    sinks = normal(4, seed=2)
    scores = query.double() @ key.double().repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
    hidden = torch.ones(40, 90, dtype=torch.bool).triu(51)
    lse = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    lse = torch.logaddexp(lse, sinks.double()[:, None]).float()
    options = {"heads": heads, "sinks": sinks, "horizon": (3, 20)}
    for chosen in (heads, [0, 3]):
        options["heads"] = chosen
        expected = attention_received(query, key, backend="reference", **options)
        assert_close(attention_received(query, key, lse=lse, **options), expected)
    with pytest.raises(TokenWeightsError, match="does not belong to these q and k"):
        attention_received(query, key, lse=lse + 0.1, **options)
    # `fixed` alone needs the first keys only, unless columns are asked for too.
    both = {"kinds": ("fixed",), "lse": lse, "sinks": sinks, "fixed_k": 5}
    found = attention_statistics(query, key, received=Received((3, 20)), **both)
    assert_close(found.received, attention_received(query, key, sinks=sinks, horizon=(3, 20)))


def test_one_sweep_gives_rows_and_columns():
    query, key = normal(2, 4, 60, 8), normal(2, 2, 80, 8, seed=1)
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[0, :30] = False
    rows = torch.rand(2, 60) < 0.5
    asked = Received((1, 20), "max")
    found = attention_statistics(
        query, key, received=asked, rows=rows, distance_bound=7, key_mask=mask
    )
    alone = attention_statistics(query, key, distance_bound=7, key_mask=mask)
    for kind, value in vars(alone).items():
        assert kind == "received" or torch.equal(getattr(found, kind), value)
    options = {"horizon": (1, 20), "reduction": "max", "rows": rows, "key_mask": mask}
    assert found.received is not None and found.mean_distance is not None
    assert torch.equal(found.received, attention_received(query, key, **options))
    bounded = attention_distance(query, key, bound=7, key_mask=mask)
    assert torch.equal(found.mean_distance, bounded)


@settings(deadline=None, max_examples=40)
@given(attention_inputs(), st.sampled_from(["mean_distribution", "none"]))
def test_sums_over_all_keys_are_the_mass_of_the_rows(inputs, heads):
    query, key, arguments = inputs
    arguments = {name: arguments[name] for name in arguments if name not in ("top_k", "fixed_k")}
    options = arguments | {"heads": heads}
    columns = attention_received(query, key, reduction="sum", **options)
    mass = attention_statistics(query, key, kinds=("row_mass",), **options).row_mass
    assert mass is not None
    torch.testing.assert_close(
        columns.sum(-1, dtype=torch.float64),
        mass.sum(-1, dtype=torch.float64),
        atol=1e-4,
        rtol=1e-5,
    )


def test_columns_that_miss_the_mass_of_the_rows_are_refused(monkeypatch):
    query, key = normal(1, 4, 300, 8), normal(1, 2, 300, 8, seed=1)
    add = received_chunked.ColumnSums.add

    def lossy(self, weights, block, heads):
        add(self, weights, block, heads)
        self.sums[:, :9] = 0.0

    monkeypatch.setattr(received_chunked.ColumnSums, "add", lossy)
    for reduction in REDUCTIONS:
        with pytest.raises(TokenWeightsError, match="columns that sum to the mass of their rows"):
            attention_received(query, key, reduction=reduction)


# Layout.


@settings(deadline=None, max_examples=40)
@given(
    lengths(max_token=150),
    st.data(),
    st.sampled_from(HORIZONS),
    st.sampled_from(REDUCTIONS),
    st.sampled_from([None, 9]),
)
def test_every_layout_gives_the_same_numbers(lengths, data, horizon, reduction, window):
    queries = [data.draw(st.integers(1, length)) for length in lengths]
    options = {"horizon": horizon, "reduction": reduction, "window": window}
    parts = [
        (normal(1, 4, count, 8, seed=row), normal(1, 2, length, 8, seed=100 + row))
        for row, (count, length) in enumerate(zip(queries, lengths, strict=True))
    ]
    asked = [torch.rand(1, count) < 0.7 for count in queries]
    alone = [
        attention_received(*part, rows=rows, **options)[0]
        for part, rows in zip(parts, asked, strict=True)
    ]
    packed = attention_received_varlen(
        torch.cat([q[0].transpose(0, 1) for q, _ in parts]),
        torch.cat([k[0].transpose(0, 1) for _, k in parts]),
        cu_seqlens_q=torch.tensor([0, *queries]).cumsum(0),
        cu_seqlens_k=torch.tensor([0, *lengths]).cumsum(0),
        rows=torch.cat([rows[0] for rows in asked]),
        **options,
    )
    assert torch.equal(packed, torch.cat(alone))
    longest = max(lengths)
    for side in ("left", "right"):
        query = torch.full((len(lengths), 4, longest, 8), torch.nan)
        key = torch.full((len(lengths), 2, longest, 8), torch.nan)
        mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
        rows = torch.rand(len(lengths), longest) < 0.5
        places = []
        for row, ((q, k), length) in enumerate(zip(parts, lengths, strict=True)):
            start = longest - length if side == "left" else 0
            place = slice(start, start + length)
            past = length - q.shape[2]
            # Padded queries cover all positions; those before the given ones do not count.
            query[row, :, place] = torch.cat([torch.zeros(4, past, 8), q[0]], dim=1)
            key[row, :, place], mask[row, place] = k[0], True
            rows[row, place] = torch.cat([torch.zeros(past, dtype=torch.bool), asked[row][0]])
            places.append(place)
        found = attention_received(query, key, key_mask=mask, rows=rows, **options)
        for row, place in enumerate(places):
            # Blocks of rows start elsewhere, so only rounding may differ.
            assert_close(found[row, place], alone[row], 2e-6)
        assert not found[~mask].any()


@pytest.mark.parametrize("workspace_bytes", [1, 20_000])
def test_a_bounded_workspace_changes_nothing(workspace_bytes):
    query, key = normal(2, 4, 60, 8), normal(2, 2, 90, 8, seed=1)
    options = {"horizon": (2, 30), "reduction": "mean"}
    found = attention_received(query, key, workspace_bytes=workspace_bytes, **options)
    assert_close(found, attention_received(query, key, backend="reference", **options), 2e-6)


def test_nothing_asked_gives_nothing():
    assert attention_received(normal(2, 2, 0, 4), normal(2, 2, 3, 4)).tolist() == [[0.0] * 3] * 2
    empty = torch.zeros(1, 3, dtype=torch.bool)
    query = normal(1, 2, 3, 4)
    assert not attention_received(query, query, key_mask=empty).any()
    assert not attention_received(query, query, rows=empty, reduction="max").any()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_query_alone_gives_its_row(backend):
    query, key = normal(1, 2, 1, 4), normal(1, 2, 5, 4, seed=1)
    maps, _ = dense_maps(query, key)
    found = attention_received(query, key, backend=backend)
    assert_close(found, maps.mean(1)[:, 0], 2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": (-1, None)}, "distances >= 0"),
        ({"horizon": (5, 4)}, "to rise"),
        ({"heads": []}, "at least one"),
        ({"heads": [4]}, "from 0 to 3"),
        ({"heads": [1, 1]}, "each once"),
        ({"heads": "mean_entropy"}, "for a distribution|kinds"),
        ({"rows": torch.ones(1, 4, dtype=torch.bool)}, "rows"),
        ({"key_mask": torch.ones(1, 4, dtype=torch.bool)}, "key_mask"),
        ({"window": 0}, "window"),
    ],
    ids=str,
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(TokenWeightsError, match=message):
        attention_received(torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8), **options)


def test_a_bound_without_a_meaning_is_refused():
    with pytest.raises(TokenWeightsError, match="`attention_distance`: expected `bound`"):
        attention_distance(torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8), bound=0)


def test_huge_horizons_fit_any_integer():
    query, key = normal(1, 2, 5, 4), normal(1, 2, 5, 4, seed=1)
    whole = attention_received(query, key)
    assert torch.equal(attention_received(query, key, horizon=(None, 2**70)), whole)
    assert not attention_received(query, key, horizon=(2**70, None)).any()
    assert torch.equal(attention_distance(query, key, bound=2**70), attention_distance(query, key))


def test_autocast_changes_nothing():
    query, key = normal(1, 4, 200, 8), normal(1, 2, 200, 8, seed=1)
    expected = attention_received(query, key, horizon=(1, 50))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_received(query, key, horizon=(1, 50)), expected)
