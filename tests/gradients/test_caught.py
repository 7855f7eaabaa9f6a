"""Gradients caught in the backward pass: their geometry, and what an engine sees of it."""

import pytest
import torch
import torch.distributed as dist
from gradients import tiny_policy
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

import tokenweights as tw


class Experts(nn.Module):
    """A sum over experts, each of which sees only the tokens that are routed to it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(3, 1).double() for _ in range(3)])
        self.shared = nn.Linear(1, 1, bias=False).double()

    def forward(self, inputs, routes):
        out = inputs.new_zeros(inputs.shape[:-1])
        for number, expert in enumerate(self.experts):
            if (routes == number).any():
                out = out + torch.where(routes == number, self.shared(expert(inputs))[..., 0], 0)
        return out


def routed():
    """Rows of rank 0 go to the experts 0 and 2, those of rank 1 to the expert 1."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(4, 6, 3, generator=generator, dtype=torch.float64)
    routes = torch.tensor([[0], [2], [1], [1]]).expand(4, 6)
    return inputs, routes, torch.ones(4, 6, dtype=torch.bool)


def probed(model, caught, loss, groups, mask, count):
    probe = tw.GradientProbe(
        model, group=caught.group, backward=caught.backward, gradients=caught.take
    )
    return probe.geometry(loss, groups, mask=mask, count=count)


def policy_on(rank, size, checkpointed):
    batch, model = tiny_policy.Batch(), tiny_policy.policy(checkpointed=checkpointed)
    rows, engine = (slice(0, 1), slice(1, 4))[rank], []
    batch.loss(model, rows).mean().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(engine.append)
    with tw.CaughtGradients(model, group=dist.group.WORLD) as caught:
        groups, mask = batch.deciles[rows], batch.mask[rows]
        found = probed(model, caught, lambda: batch.loss(model, rows), groups, mask, 10)
    kept = all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
    return found, kept, engine


@pytest.mark.parametrize("checkpointed", [False, True])
def test_two_ranks_find_what_one_probe_finds_and_the_engine_sees_nothing(checkpointed):
    batch, model = tiny_policy.Batch(), tiny_policy.policy()
    expected = tw.GradientProbe(model).geometry(
        lambda: batch.loss(model), batch.deciles, mask=batch.mask, count=10
    )
    for found, kept, engine in on_ranks(policy_on, 2, checkpointed):
        assert kept and engine == []
        assert found.full_norm == pytest.approx(expected.full_norm, rel=1e-12)
        for own, one in zip(found.groups, expected.groups, strict=True):
            assert vars(own) == pytest.approx(vars(one), rel=1e-9)


def experts_on(rank, size):
    model, rows = Experts(), (slice(0, 2), slice(2, 4))[rank]
    inputs, routes, mask = (part[rows] for part in routed())
    groups = torch.arange(6).remainder(3).expand(2, 6)
    with tw.CaughtGradients(model, group=dist.group.WORLD) as caught:
        return probed(model, caught, lambda: model(inputs, routes), groups, mask, 3)


def test_ranks_may_leave_out_parameters_that_others_use():
    model, (inputs, routes, mask) = Experts(), routed()
    expected = tw.GradientProbe(model).geometry(
        lambda: model(inputs, routes), torch.arange(6).remainder(3).expand(4, 6), mask=mask, count=3
    )
    first, second = on_ranks(experts_on, 2)
    assert first == second
    assert first.full_norm == pytest.approx(expected.full_norm, rel=1e-12)
    for own, one in zip(first.groups, expected.groups, strict=True):
        assert vars(own) == pytest.approx(vars(one), rel=1e-9)


def test_a_pass_that_failed_leaves_nothing_to_the_next():
    model, inputs = nn.Linear(2, 1, bias=False), torch.tensor([3.0, 4.0])
    with tw.CaughtGradients(model) as caught:
        wrong = model(inputs).sum()
        wrong.register_hook(lambda gradient: gradient.new_zeros(7))
        with pytest.raises(RuntimeError):
            caught.backward(wrong)
        caught.backward(model(inputs).sum())
        caught.backward(model(inputs).sum())
        assert [share.tolist() for share in caught.take()] == [[6.0, 8.0]]
    assert caught.take() == []
    assert model.weight._backward_hooks == {}


def test_bfloat16_gradients_add_up_in_float32():
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    with tw.CaughtGradients(model) as caught:
        for value in (256.0, 1.0):
            caught.backward(model(torch.tensor([value], dtype=torch.bfloat16)).sum())
        (share,) = caught.take()
    assert share.dtype == torch.float32 and float(share) == 257


def sharded_on(rank, size):
    try:
        tw.CaughtGradients(fully_shard(nn.Linear(2, 1)))
    except tw.TokenWeightsError as error:
        return str(error)


def test_parameters_that_know_their_mesh_are_refused():
    for message in on_ranks(sharded_on, 2):
        assert "expected `model` without DTensors" in message
