"""Two ranks, each with half of the rows, give what one process gives with all of them."""

import pytest
import torch
import torch.distributed as dist
from gradients import tiny_policy
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

import tokenweights as tw
from tokenweights.gradients.sketch import gradient_sketch


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as pool:
        yield pool


def wrapped(kind: str, **options) -> nn.Module:
    model = tiny_policy.policy(**options)
    if kind == "plain":
        return model
    if kind in ("ddp", "ddp_buckets"):
        view = kind == "ddp_buckets"
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view)
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def rows_of(rank: int) -> slice:
    return slice(0, 1) if rank == 0 else slice(1, 4)  # as unequal as can be


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def alignment_on(rank, size, kind, options, alignment_options):
    batch, model = tiny_policy.Batch(), wrapped(kind, **options)
    for _ in range(2):  # gradients that have to survive; DDP rebuilds its buckets after the first
        batch.loss(model, rows_of(rank)).mean().backward()
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    before = [local(tensor).clone() for tensor in tensors]
    rows = rows_of(rank)
    found = tw.token_alignment(
        lambda: batch.loss(model, rows),
        model,
        mask=batch.mask[rows],
        group=dist.group.WORLD,
        **alignment_options,
    )
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    unchanged = all(torch.equal(a, local(b)) for a, b in zip(before, tensors, strict=True))
    ratios = tw.group_projection_ratios(
        found.projection_ratio,
        batch.deciles[rows],
        batch.mask[rows],
        count=10,
        group=dist.group.WORLD,
    )
    return found.inner, found.full_squared_norm, ratios, unchanged


@pytest.mark.parametrize("kind", ["ddp", "ddp_buckets", "fsdp2"])
@pytest.mark.parametrize(
    ("checkpointed", "alignment_options"),
    # Forward mode serves neither shards nor checkpoints: differences take over on all ranks.
    [(False, {}), (True, {}), (False, {"method": "auto", "compare_steps": True})],
)
def test_token_alignment(ranks, kind, checkpointed, alignment_options):
    batch, model = tiny_policy.Batch(), tiny_policy.policy()
    expected = tw.token_alignment(lambda: batch.loss(model), model, mask=batch.mask)
    deciles = tw.group_projection_ratios(
        expected.projection_ratio, batch.deciles, batch.mask, count=10
    )
    answers = ranks(alignment_on, kind, {"checkpointed": checkpointed}, alignment_options)
    inner = torch.cat([answer[0] for answer in answers])
    assert float((inner - expected.inner).norm() / expected.inner.norm()) < 1e-5
    for _, square, ratios, unchanged in answers:
        assert square == pytest.approx(expected.full_squared_norm, rel=1e-9)
        torch.testing.assert_close(ratios, deciles, rtol=0, atol=1e-5)
        assert unchanged


def probed_on(rank, size, kind, options, probe_options):
    batch, model = tiny_policy.Batch(), wrapped("plain" if kind == "flat" else kind, **options)
    if kind == "flat":
        probe_options |= flat_shards(model, rank, size)
    rows = rows_of(rank)
    if kind.startswith("ddp"):  # DDP rebuilds its buckets after the first backward pass
        for _ in range(2):
            batch.loss(model, rows).mean().backward()
    probe = tw.GradientProbe(model, group=dist.group.WORLD, **probe_options)
    return probe.geometry(
        lambda: batch.loss(model, rows), batch.deciles[rows], mask=batch.mask[rows], count=10
    )


def flat_shards(model, rank, size):
    """What an engine with flat shards does: average, flatten, keep the own part."""

    for parameter in model.parameters():  # as engines have them
        parameter.register_post_accumulate_grad_hook(lambda parameter: None)

    def gradients():
        flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        for parameter in model.parameters():
            parameter.grad = None
        dist.all_reduce(flat)
        return list((flat / size).tensor_split(5))[rank::size]

    return {"backward": torch.Tensor.backward, "gradients": gradients}


@pytest.mark.parametrize("kind", ["ddp", "ddp_buckets", "fsdp2", "flat"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("selection", [{}, {"layers": [1]}, {"sketch_width": 64}])
def test_gradient_probe(ranks, kind, checkpointed, selection):
    if kind == "flat" and "layers" in selection:
        return  # refused: flat shards have no names
    batch, model = tiny_policy.Batch(), tiny_policy.policy()
    loss = lambda: batch.loss(model)  # noqa: E731
    sketched = "sketch_width" in selection
    expected = tw.GradientProbe(model, **({} if sketched else selection)).geometry(
        loss, batch.deciles, mask=batch.mask, count=10
    )
    first, second = ranks(probed_on, kind, {"checkpointed": checkpointed}, dict(selection))
    assert first == second and first.full_norm == pytest.approx(expected.full_norm, rel=1e-9)
    for own, one in zip(first.groups, expected.groups, strict=True):
        assert own.norm_ratio == pytest.approx(one.norm_ratio, abs=1e-5)
        slack = 4 * first.cosine_error if sketched else 1e-5
        assert own.cosine == pytest.approx(one.cosine, abs=slack)
        assert own.projection_ratio == pytest.approx(one.projection_ratio, abs=slack * 4)


def series_on(rank, size, kind):
    batch, model, rows = tiny_policy.Batch(), wrapped(kind), rows_of(rank)
    return tw.GradientSeries().metrics(
        tw.GradientProbe(model, group=dist.group.WORLD),
        lambda: batch.loss(model, rows),
        scores=batch.scores[rows],
        mask=batch.mask[rows],
        sample_ids=torch.arange(4)[rows],
    )


def numberless_series_on(rank, size):
    batch, model, rows = tiny_policy.Batch(), wrapped("ddp"), rows_of(rank)
    probe = tw.GradientProbe(model, group=dist.group.WORLD)
    with pytest.raises(tw.TokenWeightsError) as error:
        tw.GradientSeries().metrics(
            probe,
            lambda: batch.loss(model, rows),
            scores=batch.scores[rows],
            mask=batch.mask[rows],
            sample_ids=None if rank else torch.arange(4)[rows],
        )
    return str(error.value)


def test_a_gradient_series_over_ranks_makes_up_no_numbers(ranks):
    """Row numbers are alike on all ranks, and so would be the random subset."""
    words = "`GradientSeries`: expected `sample_ids` given where several ranks share the batch"
    for told in ranks(numberless_series_on):
        assert words in told


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradient_series(ranks, kind):
    batch, model = tiny_policy.Batch(), tiny_policy.policy()
    expected = tw.GradientSeries().metrics(
        tw.GradientProbe(model), lambda: batch.loss(model), scores=batch.scores, mask=batch.mask
    )
    first, second = ranks(series_on, kind)
    assert first == second == pytest.approx(expected, abs=1e-5)


def sketched_on(rank, size):
    sketch = gradient_sketch([torch.arange(40.0)], width=8, seed=0, group=dist.group.WORLD)
    return next(iter(sketch.values()))


def test_ranks_sketch_independently(ranks):
    first, second = ranks(sketched_on)
    assert not torch.equal(first, second)
