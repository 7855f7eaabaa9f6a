"""What a probe leaves behind in a model and in the random generators: nothing."""

import random

import numpy as np
import pytest
import torch
from tiny_models import SMALL
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import tokenweights as tw
from tokenweights import TokenWeightsError

MASK = torch.ones(1, 3, dtype=torch.bool)


class Replacing(nn.Module):
    """Replaces, adds and deletes buffers in its forward pass, and counts its passes beside them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1).double()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("once", torch.ones(3))
        self.register_buffer("later", None)
        self.passes = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        # With another count in each pass, losses would drift.
        self.scale = self.scale * (1 + self.passes)
        self.later = torch.zeros(1)
        self.register_buffer(f"pass_{self.passes}", torch.zeros(1), persistent=False)
        if "once" in self._buffers:
            del self.once
        return self.linear(inputs)[..., 0] * self.scale


def probes(model, loss, mask):
    tw.token_alignment(loss, model, mask=mask)
    tw.token_alignment(loss, model, mask=mask, method="forward")
    groups = torch.arange(mask.shape[1]).expand(mask.shape)
    tw.GradientProbe(model).geometry(loss, groups, mask=mask, count=mask.shape[1])


def test_replaced_buffers_are_put_back_with_what_is_kept_beside_them():
    model, inputs = Replacing(), torch.randn(1, 3, 2, dtype=torch.float64)
    slots, saved = dict(model._buffers), set(model.state_dict())
    probes(model, lambda: model(inputs), MASK)
    assert model._buffers.keys() == slots.keys() and model.passes == 0
    assert all(model._buffers[name] is buffer for name, buffer in slots.items())
    assert model.scale == 1 and set(model.state_dict()) == saved


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "stretched before"])
def test_a_rotary_embedding_forgets_the_length_of_the_probe(warm):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = SMALL | {"max_position_embeddings": 8, "rope_parameters": rope}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **config), attn_implementation="eager"
    ).double()
    ids = torch.randint(3, 32, (1, 20), generator=torch.Generator().manual_seed(0))
    if warm:
        model(ids[:, :12])
    rotary = model.model.rotary_emb
    before, length = rotary.inv_freq, int(rotary.max_seq_len_cached)
    frequencies = before.clone()

    def loss():
        return model(ids, use_cache=False).logits.log_softmax(-1)[..., 0]

    with torch.no_grad():
        loss()  # the case is hard enough: a pass of its own does change them
    assert rotary.inv_freq is not before and int(rotary.max_seq_len_cached) == 20
    rotary.inv_freq, rotary.max_seq_len_cached = before, length
    probes(model, loss, torch.ones(1, 20, dtype=torch.bool))
    assert rotary.inv_freq is before and torch.equal(before, frequencies)
    assert int(rotary.max_seq_len_cached) == length


def test_every_global_generator_is_put_back_and_draws_the_same_in_each_pass():
    model, inputs, drawn = nn.Linear(2, 1).double(), torch.randn(1, 3, 2).double(), set()

    def loss():
        noise = (random.random(), float(np.random.rand()), float(torch.rand(())))
        drawn.add(noise)
        return model(inputs)[..., 0] * (1 + sum(noise))

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    probes(model, loss, MASK)
    assert len(drawn) == 1
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))


def test_parameters_that_share_memory_are_refused_and_not_moved():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data[1:])
    inputs, before = torch.randn(1, 3, 2), model[0].weight.detach().clone()

    def loss():
        return model(inputs)[..., 0]

    with pytest.raises(TokenWeightsError, match="`model` without shared memory"):
        tw.token_alignment(loss, model, mask=MASK)
    assert torch.equal(model[0].weight, before)
    # As two variables they have derivatives, which forward mode takes without moving them.
    forward = tw.token_alignment(loss, model, mask=MASK, method="forward")
    assert forward.sum_error < 1e-5 and torch.equal(model[0].weight, before)


def test_parameters_side_by_side_in_one_buffer_are_moved():
    model, inputs = nn.Linear(2, 1), torch.randn(1, 3, 2)
    flat = torch.cat([model.weight.data.flatten(), model.bias.data])
    model.weight.data, model.bias.data = flat[:2].view(1, 2), flat[2:]
    before = flat.clone()
    methods = ("differences", "forward")
    differences, forward = (
        tw.token_alignment(lambda: model(inputs)[..., 0], model, mask=MASK, method=method)
        for method in methods
    )
    torch.testing.assert_close(differences.inner, forward.inner, rtol=1e-3, atol=1e-5)
    assert torch.equal(flat, before)


def test_sparse_gradients_are_taken_like_others():
    ids, inners = torch.tensor([[1, 2, 1]]), []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(4, 2, sparse=sparse).double()
        model(ids).sum().backward()  # a gradient that has to survive
        gradient = model.weight.grad
        inners.append(tw.token_alignment(lambda: model(ids).sum(-1), model, mask=MASK).inner)  # noqa: B023
        assert model.weight.grad is gradient and gradient.is_sparse == sparse
    torch.testing.assert_close(*inners)
