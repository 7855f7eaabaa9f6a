"""Megatron-core over layouts of gloo ranks: entropies, weights and gradients of plain torch."""

import functools
import importlib.util
import os

import pytest
import torch
from capture.megatron_ranks import ADVANTAGES, LENGTHS, PROBED, RECIPE, STEP, Layout, decided
from capture.megatron_ranks import sequences, surrogate, trained_on
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
