"""Packed rows: several sequences one after another, on one rank or sliced over several."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tiny_models import eager_entropy, tiny

import tokenweights as tw
from tokenweights import TokenWeightsError
from tokenweights.capture import masks

LENGTHS = [7, 1, 12, 4]


def sequences():
    ids = torch.randint(3, 32, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    return ids, torch.cat([torch.arange(length) for length in LENGTHS])


def expected_entropy(model, ids, layer):
    """Each sequence in a row of its own, from the model's own attention matrix."""
    parts = []
    for sequence in ids.split(LENGTHS):
        with torch.no_grad():
            weights = model(sequence[None], output_attentions=True).attentions[layer]
        parts.append(eager_entropy(weights, torch.ones(1, len(sequence), dtype=torch.bool)))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("layer", [0, 1])
def test_packed_rows_score_like_sequences_of_their_own(family, attention, layer):
    ids, positions = sequences()
    if family == "gemma2" and attention == "sdpa":
        attention = "eager"  # sdpa has no soft cap
    model = tiny(family, attention)
    with torch.no_grad(), tw.capture_attention(model, [layer], packed=True) as capture:
        model(ids[None], position_ids=positions[None], use_cache=False)
    entropy = capture.calls[layer][0].packed_entropy()
    expected = expected_entropy(tiny(family), ids, layer)
    torch.testing.assert_close(entropy.double(), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.02, "the test needs distributions that differ"


def test_a_row_with_one_sequence_is_a_packed_row():
    ids, _ = sequences()
    model = tiny("qwen3", "sdpa")
    with torch.no_grad(), tw.capture_attention(model, [1], packed=True) as packed:
        model(ids[None], use_cache=False)
    with torch.no_grad(), tw.capture_attention(model, [1]) as plain:
        model(ids[None], use_cache=False)
    torch.testing.assert_close(packed.calls[1][0].packed_entropy(), plain.calls[1][0].entropy())


def test_the_kinds_of_entropy_and_rows_do_not_mix():
    ids, positions = sequences()
    model = tiny("qwen3", "sdpa")
    with torch.no_grad(), tw.capture_attention(model, [0], packed=True) as capture:
        model(ids[None], position_ids=positions[None], use_cache=False)
    with pytest.raises(TokenWeightsError, match="packed_entropy"):
        capture.calls[0][0].entropy()
    with torch.no_grad(), tw.capture_attention(model, [0]) as capture:
        model(ids[None], use_cache=False)
    with pytest.raises(TokenWeightsError, match="packed=True"):
        capture.calls[0][0].packed_entropy()
    with (
        pytest.raises(TokenWeightsError, match="rows"),
        tw.capture_attention(model, [0], rows=3, packed=True),
    ):
        pass


def test_rows_that_are_no_packed_row_are_refused(monkeypatch):
    ids, positions = sequences()
    model = tiny("qwen3", "sdpa")

    def run(match, ids, **options):
        with (
            torch.no_grad(),
            pytest.raises(TokenWeightsError, match=match),
            tw.capture_attention(model, [0], packed=True),
        ):
            model(ids, use_cache=False, **options)

    run("not one packed row", ids.view(2, 12))
    # A mask that lets sequences see each other, as a padding mask on packed rows makes it.
    run("mixes", ids[None], position_ids=positions[None], attention_mask=torch.tril(ONES))
    # A mask is looked at some rows at a time; this one is wrong in its last row only.
    late = apart(positions)
    late[..., -1, 0] = True
    monkeypatch.setattr(masks, "ENTRIES_AT_ONCE", 5 * sum(LENGTHS))
    run("mixes", ids[None], position_ids=positions[None], attention_mask=late)
    with torch.no_grad(), tw.capture_attention(model, [0], packed=True):
        model(
            ids[None],
            position_ids=positions[None],
            attention_mask=apart(positions),
            use_cache=False,
        )


def apart(positions):
    """A mask in which a query sees the keys of its own sequence up to itself."""
    sequence = (positions == 0).cumsum(0)
    return torch.tril(ONES) & (sequence[:, None] == sequence)


ONES = torch.ones(1, 1, sum(LENGTHS), sum(LENGTHS), dtype=torch.bool)


def test_sequences_that_nothing_keeps_apart_are_refused():
    ids, positions = sequences()
    model = tiny("qwen3", "sdpa")
    layer = model.model.layers[0].self_attn
    options = {"position_ids": positions[None]}
    hidden = model.model.embed_tokens(ids[None])
    options["position_embeddings"] = model.model.rotary_emb(hidden, positions[None])
    with (
        torch.no_grad(),
        pytest.raises(TokenWeightsError, match="no mask between"),
        tw.capture_attention(model, [0], packed=True),
    ):
        layer(hidden, attention_mask=None, **options)


def packed(seed=0, heads=4, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(seed)
    _, positions = sequences()
    query = torch.randn(len(positions), heads, dim, generator=generator) * 2
    key = torch.randn(len(positions), kv_heads, dim, generator=generator)
    return query, key, positions


OPTIONS = [
    {"kind": "normalized"},
    {"kind": "raw", "window": 3},
    {"kind": "topk", "top_k": 3, "softcap": 2.0},
    {"kind": "fixed", "fixed_k": 4, "scale": 0.5},
]
# Slices that begin and end within sequences, also one token long, also empty.
CUTS = [(5, 24), (0, 13), (8, 9, 22), (13, 13, 20)]


def sliced_entropies(rank, size, cuts):
    query, key, positions = packed()
    bounds = [0, *cuts, len(positions)]
    own = slice(bounds[rank], bounds[rank + 1]) if rank < size else slice(0, 0)
    return [
        tw.packed_entropy(query[own], key[own], positions[own], group=dist.group.WORLD, **options)
        for options in OPTIONS
    ]


@pytest.mark.parametrize("cuts", CUTS)
def test_slices_over_ranks_equal_one_rank(cuts):
    query, key, positions = packed()
    results = on_ranks(sliced_entropies, len(cuts) + 1, cuts)
    for number, options in enumerate(OPTIONS):
        expected = tw.packed_entropy(query, key, positions, **options)
        sliced = torch.cat([result[number] for result in results])
        torch.testing.assert_close(sliced, expected, atol=1e-6, rtol=1e-6)


def test_positions_that_jump_are_refused():
    query, key, positions = packed()
    for place, value in ((0, 1), (3, 5)):
        wrong = positions.clone()
        wrong[place] = value
        with pytest.raises(TokenWeightsError, match="counting up"):
            tw.packed_entropy(query, key, wrong)


def test_a_recipe_reads_both_kinds_of_rows():
    ids, positions = sequences()
    model, made = tiny("qwen3", "sdpa"), tw.recipe({"name": "low2high", "entropy_kind": "raw"})
    for is_packed, method in ((True, "packed_entropy"), (False, "entropy")):
        options = {"position_ids": positions[None]} if is_packed else {}
        with torch.no_grad(), tw.capture_attention(model, [0], packed=is_packed) as capture:
            model(ids[None], use_cache=False, **options)
        (captured,) = capture.calls[0]
        expected = getattr(captured, method)(kind="raw")
        assert torch.equal(made.attention.captured(captured), expected)


def test_a_recipe_finds_its_layers_in_a_model():
    model = tiny("qwen3", "sdpa")
    assert tw.recipe("low2high").on_model(model).layers == (tw.middle_layer(4),)
    assert tw.recipe({"name": "low2high", "layers": [-1, 0]}).on_model(model).layers == (3, 0)
    assert tw.recipe("random20").on_model(torch.nn.Linear(1, 1)).layers == ()
    with pytest.raises(TokenWeightsError, match="Linear"):
        tw.recipe("low2high").on_model(torch.nn.Linear(1, 1))
