"""Sequence- and tensor-parallel entropies on real gloo ranks equal those of one process."""

import pytest
import torch
import torch.distributed as dist
from attention.counted import CountedBytes
from ranks import on_ranks

import tokenweights as tw

TOKENS, HEADS, KV_HEADS, DIM = 22, 8, 4, 8
OPTIONS = [
    {"kind": "normalized"},
    {"kind": "raw", "window": 5},
    {"kind": "topk", "top_k": 3, "softcap": 2.0},
    {"kind": "fixed", "fixed_k": 4, "scale": 0.5},
]


def batch():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, HEADS, TOKENS, DIM, generator=generator) * 2
    key = torch.randn(2, KV_HEADS, TOKENS, DIM, generator=generator)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[0, :5] = False
    mask[1, -3:] = False
    sinks = torch.randn(HEADS, generator=generator)
    poison = torch.where(mask, 0.0, torch.nan)[:, None, :, None]
    return query + poison, key + poison, mask, sinks


def shards(size):
    """Contiguous (Ulysses, uneven), zigzag and striped (ring) layouts of the sequence."""
    places = torch.arange(TOKENS)
    blocks = places.tensor_split(2 * size)
    contiguous = [*places[: TOKENS - 3].tensor_split(size - 1), places[TOKENS - 3 :]]
    zigzag = [torch.cat([blocks[r], blocks[-1 - r]]) for r in range(size)]
    striped = [places[r::size].flip(0) for r in range(size)]
    return {"ulysses": contiguous, "zigzag": zigzag, "striped": striped}


def own_entropies(rank, size):
    query, key, mask, sinks = batch()
    world = dist.group.WORLD
    found = {}
    for layout, places in shards(size).items():
        own = places[rank]
        for number, options in enumerate(OPTIONS):
            found[layout, number] = (
                own,
                tw.sequence_parallel_entropy(
                    query[:, :, own],
                    key[:, :, own],
                    own,
                    group=world,
                    key_mask=mask[:, own],
                    sinks=sinks,
                    **options,
                ),
            )
    heads = slice(rank * HEADS // size, (rank + 1) * HEADS // size)
    kv_heads = slice(rank * KV_HEADS // size, (rank + 1) * KV_HEADS // size)
    for exchange in ("rows", "distribution", "auto"):
        for number, options in enumerate(OPTIONS):
            found[exchange, number] = tw.tensor_parallel_entropy(
                query[:, heads, 4:],
                key[:, kv_heads],
                group=world,
                key_mask=mask,
                sinks=sinks[heads],
                exchange=exchange,
                **options,
            )
    whole = torch.ones_like(mask)
    clean_query, clean_key = query.nan_to_num(), key.nan_to_num()
    for exchange in ("rows", "distribution"):
        with CountedBytes() as counted:
            tw.tensor_parallel_entropy(
                clean_query[:, heads], clean_key[:, kv_heads], group=world, exchange=exchange
            )
        found["bytes", exchange] = counted.received
    with CountedBytes() as counted:
        own = shards(size)["zigzag"][rank]
        tw.sequence_parallel_entropy(
            clean_query[:, :, own], clean_key[:, :, own], own, group=world, key_mask=whole[:, own]
        )
    found["bytes", "sequence"] = counted.received
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_one_process_and_move_the_bytes_they_say(size):
    query, key, mask, sinks = batch()
    results = on_ranks(own_entropies, size)
    for number, options in enumerate(OPTIONS):
        expected = tw.attention_entropy(query, key, key_mask=mask, sinks=sinks, **options)
        for layout in shards(size):
            got = torch.full_like(expected, torch.nan)
            for result in results:
                own, entropy = result[layout, number]
                got[:, own] = entropy
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        for exchange in ("rows", "distribution", "auto"):
            for result in results:
                torch.testing.assert_close(
                    result[exchange, number], expected[:, 4:], atol=2e-6, rtol=1e-5
                )
    shape = {"batch": 2, "kv_heads": KV_HEADS, "dim": DIM, "ranks": size, "element_bytes": 4}
    said = tw.tensor_parallel_bytes(queries=TOKENS, keys=TOKENS, heads=HEADS, **shape)
    received = {
        name: sum(result["bytes", name] for result in results) / size
        for name in ("rows", "distribution", "sequence")
    }
    assert received["distribution"] == pytest.approx(said.distribution, rel=0.01)
    # Blocks of rows differ by a row where they do not divide.
    assert received["rows"] == pytest.approx(said.rows, rel=0.05)
    # Shards travel padded to the longest one.
    said = tw.sequence_parallel_bytes(keys=TOKENS, **shape)
    assert said <= received["sequence"] <= said * 1.1


def short_on(rank, size, tokens, exchange):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2 * size, tokens, DIM, generator=generator)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    own, heads = slice(2 * rank, 2 * rank + 2), {"key_mask": mask, "kind": "raw"}
    group = dist.group.WORLD
    found = tw.tensor_parallel_entropy(
        query[:, own], key[:, own], group=group, exchange=exchange, **heads
    )
    return found, tw.attention_entropy(query, key, **heads)


@pytest.mark.parametrize("exchange", ["rows", "distribution"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3])
def test_a_sequence_may_have_fewer_tokens_than_there_are_blocks(exchange, tokens):
    for found, expected in on_ranks(short_on, 2, tokens, exchange):
        assert found.shape == (1, tokens)
        torch.testing.assert_close(found, expected)


def test_short_sequences_move_weights_and_long_ones_move_rows():
    shape = {"batch": 1, "heads": 32, "kv_heads": 8, "dim": 128, "ranks": 8, "element_bytes": 2}
    short = tw.tensor_parallel_bytes(queries=256, keys=256, **shape)
    long = tw.tensor_parallel_bytes(queries=16384, keys=16384, **shape)
    assert short.distribution < short.rows and long.rows < long.distribution


def test_positions_that_miss_a_token_are_refused():
    query, key = (values.nan_to_num() for values in batch()[:2])
    with pytest.raises(tw.TokenWeightsError, match="permutation"):
        tw.sequence_parallel_entropy(query, key, torch.arange(1, TOKENS + 1))


@pytest.mark.parametrize("exchange", ["rows", "distribution"])
def test_non_finite_scores_are_refused(exchange):
    query = torch.full((1, 2, 3, 4), torch.nan)
    with pytest.raises(tw.TokenWeightsError, match="finite"):
        tw.tensor_parallel_entropy(query, torch.ones(1, 2, 3, 4), exchange=exchange)


@pytest.mark.parametrize("exchange", ["rows", "distribution"])
def test_what_no_exchange_could_serve_is_refused_alike(exchange):
    query, key = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8)
    for options, name in (
        ({"softcap": -1.0}, "softcap"),
        ({"scale": torch.inf}, "scale"),
        ({"window": 0}, "window"),
        ({"top_k": 0}, "top_k"),
        ({"query": torch.ones(1, 3, 3, 8)}, "query"),
        ({"query": torch.ones(1, 4, 4, 8)}, "query"),
    ):
        arguments = {"query": query, "key": key, "exchange": exchange} | options
        with pytest.raises(
            tw.TokenWeightsError, match=f"tensor_parallel_entropy`: expected `{name}"
        ):
            tw.tensor_parallel_entropy(**arguments)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_changes_nothing(default):
    query, key = (values.nan_to_num() for values in batch()[:2])
    row = {"query": query[0].transpose(0, 1), "key": key[0].transpose(0, 1)}

    def entropies():
        yield tw.sequence_parallel_entropy(query, key, torch.arange(TOKENS))
        yield tw.packed_entropy(**row, position_ids=torch.arange(TOKENS))
        for exchange in ("rows", "distribution"):
            yield tw.tensor_parallel_entropy(query, key, exchange=exchange)

    expected = list(entropies())
    torch.set_default_dtype(default)
    try:
        found = list(entropies())
    finally:
        torch.set_default_dtype(torch.float32)
    for own, one in zip(found, expected, strict=True):
        assert own.dtype == torch.float32 and torch.equal(own, one)


def test_the_averaged_weights_are_float32_under_autocast():
    query, key = (values.nan_to_num() for values in batch()[:2])
    expected = tw.tensor_parallel_entropy(query, key, exchange="distribution")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tw.tensor_parallel_entropy(query, key, exchange="distribution")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("sink", [1e4, 1e9])
def test_a_sink_that_takes_all_of_a_head_leaves_the_others_their_digits(sink):
    query, key = (values.nan_to_num()[:, :KV_HEADS] for values in batch()[:2])
    sinks = torch.tensor([sink, 0.0, 0.0, 0.0])
    found = tw.tensor_parallel_entropy(query, key, sinks=sinks, exchange="distribution", kind="raw")
    query, key = query.double(), key.double()
    score = query @ key.transpose(-1, -2) * DIM**-0.5
    score = score.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
    own = score.logsumexp(-1, keepdim=True)
    weights = (score - torch.logaddexp(own, sinks.double()[:, None, None])).exp().mean(1)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = -torch.special.xlogy(weights, weights).sum(-1)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
