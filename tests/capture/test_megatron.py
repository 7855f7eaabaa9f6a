"""Megatron-core over layouts of gloo ranks: entropies, weights and gradients of plain torch."""

import functools
import importlib.util
import os

import pytest
import torch
from capture.megatron_calls import VARIANTS, own_probabilities_on, refusals_on, seams_on, stages_on
from capture.megatron_ranks import (
    ADVANTAGES,
    LENGTHS,
    PROBED,
    RECIPE,
    STEP,
    Layout,
    decided,
    sequences,
    surrogate,
    trained_on,
)
from capture.megatron_reference import Reference, shapes
from ranks import Ranks

import tokenweights as tw

pytestmark = pytest.mark.megatron
LAYOUTS = {
    "one rank": Layout(),
    "tensor": Layout(tp=2),
    "sequence": Layout(tp=2, sp=True),
    "fewer key groups": Layout(tp=4, groups=2),
    "four": Layout(tp=4, sp=True),
    "context": Layout(cp=2),
    "packed": Layout(packed=True),
    "packed over all": Layout(tp=2, sp=True, cp=2, packed=True),
    "pipeline": Layout(tp=2, pp=2),
    "packed pipeline": Layout(cp=2, pp=2, packed=True),
    "virtual pipeline": Layout(pp=2, chunks=2),
    "experts": Layout(tp=2, sp=True, experts=True),
    "packed experts": Layout(cp=2, experts=True, packed=True),
    "recomputed": Layout(recompute="full"),
    "recomputed attention": Layout(tp=2, recompute="selective"),
}


@pytest.fixture(scope="module", autouse=True)
def _megatron_core():
    if importlib.util.find_spec("megatron") is None:
        # On a user's machine without it these tests are skipped; in `make test` they have to run.
        assert "REQUIRE_MEGATRON" not in os.environ, "megatron-core is not installed"
        pytest.skip("needs megatron-core")


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4, seconds=120) as pool:
        yield pool


@functools.cache
def expected(groups, experts):
    """Entropies, weights and gradients of each sequence alone, dense, in float64."""
    model = Reference(groups, experts)
    with torch.no_grad():
        passes = [model(ids, PROBED) for ids in sequences()]
    scores, mask = decided([entropy for _, entropy in passes])
    weights = tw.recipe(RECIPE).token_weights(scores, mask, step=STEP)
    total = 0.0
    for row, (ids, (prompt, response)) in enumerate(zip(sequences(), LENGTHS, strict=True)):
        log_probs = model(ids, PROBED)[0][prompt - 1 :][None]
        own = weights[row, :response][None] * ADVANTAGES[row]
        valid = torch.ones(1, response, dtype=torch.bool)
        total = total + surrogate(log_probs, log_probs.detach(), own, valid, mask.sum())
    total.backward()
    gradients = {name: p.grad for name, p in model.parameters.items()}
    return [entropy for _, entropy in passes], weights, gradients


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_training_step_is_that_of_each_sequence_alone(ranks, name):
    layout = LAYOUTS[name]
    entropies, weights, gradients = expected(layout.groups, layout.experts)
    seen = set()
    for own_entropies, own_weights, own_gradients in ranks(trained_on, layout):
        for got, want in zip(own_entropies, entropies, strict=True):
            torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
        torch.testing.assert_close(own_weights.double(), weights.double(), atol=1e-5, rtol=0)
        for parameter, (gradient, axis, rank) in own_gradients.items():
            want = gradients[parameter]
            scale = float(want.abs().max())
            if axis is not None:
                want = want.chunk(layout.tp, axis)[rank]
            error = float((gradient.double() - want).abs().max())
            assert error <= 1e-5 * max(scale, 1e-2), (parameter, error, scale)
            seen.add(parameter)
    assert seen == set(shapes(layout.groups, layout.experts))


@pytest.mark.parametrize("name", VARIANTS)
def test_entropies_are_those_of_the_modules_own_probabilities(ranks, name):
    changes, mask = VARIANTS[name]
    raw, normalized, weights = ranks(own_probabilities_on, name)[0]
    if changes.get("softmax_type"):
        assert float(weights.sum(-1).max()) < 0.99  # the sinks take a part
        weights = weights / weights.sum(-1, keepdim=True)
    expected = -torch.special.xlogy(weights, weights).sum(-1)
    real = torch.ones_like(raw, dtype=torch.bool)
    if mask is not None:
        real[1, 9:] = False
        assert not raw[~real].any()
    # Its probabilities are rounded to bfloat16; the entropies are of the scores.
    atol = 0.02 if changes.get("bf16") else 1e-5
    torch.testing.assert_close(raw.double()[real], expected[real], atol=atol, rtol=0)
    sizes = torch.arange(1, raw.shape[1] + 1).expand_as(raw)
    if changes.get("window_size") and changes.get("window_attn_skip_freq") is None:
        sizes = sizes.clamp(max=4)
        assert int((weights[0, -1] > 0).sum()) == 4
    expected = torch.where(sizes > 1, raw / sizes.clamp(min=2).log(), 0.0)
    torch.testing.assert_close(normalized[real], expected[real], atol=1e-6, rtol=0)


REFUSED = {
    **{
        name: f"`{name}="
        for name in (
            "fp8",
            "fp4",
            "multi_latent_attention",
            "experimental_attention_variant",
            "mtp_num_layers",
            "enable_cuda_graph",
            "external_cuda_graph",
            "cuda_graph_impl",
            "flash_decode",
            "use_kitchen_attention",
        )
    },
    "window": "a window of (2, 1)",
    "no such layer": "among the 4 layers of all pipeline stages, got 4",
    "no such last layer": "among the 4 layers of all pipeline stages, got -5",
    "mask": "a mask other than causal order and padding",
    "mask kind": "a mask of the kind `no_mask`",
    "packed": "rows of one sequence each: capture with `packed=False`",
    "unpacked": "several sequences packed into a row: capture with `packed=True`",
    "core": "a core attention `Other`",
    "core forward": "a core attention `Overriding`",
    "attention": "an attention module `Latent`",
    "bypassed": "layer 2 (`decoder.layers.2.self_attention`), 0 calls of it",
    "two stacks": "with one stack of attention layers",
    "key mask": "`CapturedAttention.entropy`: expected `key_mask` None for a call over ranks",
    "method": "Call `entropy`",
    "anything else": "with all tokens and heads, got shards of them",
    "rows": "None for megatron-core",
    "dynamic": "context parallelism of another size in every batch",
    "slices": "context parallelism in contiguous slices",
    "boundaries": "where the row's boundaries give this rank",
}


def test_what_cannot_be_read_is_refused_by_name(ranks):
    found = ranks(refusals_on)[0]
    for name, words in REFUSED.items():
        assert words in str(found.get(name)), (name, found.get(name))
    assert found["last"] == [0, 3]
    places, real = found["positions"]
    assert places == [*range(14), *range(8)]
    assert real == [True] * 13 + [False] + [True] * 7 + [False]


def test_each_stage_has_the_calls_of_its_own_layers(ranks):
    for stage, calls, layers, placed in ranks(stages_on):
        assert placed == (2,)
        assert layers == [2 * stage, 2 * stage + 1]
        assert calls == ({0: [0, 0], 2: [], 3: []}, {0: [], 2: [2, 2], 3: [3, 3]})[stage]


def test_megatron_core_has_the_seams_that_the_tap_rests_on(ranks):
    wrong = ranks(seams_on)[0]
    assert wrong == [], f"megatron-core has changed {wrong}: tokenweights/capture has to follow"
