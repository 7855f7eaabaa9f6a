"""What a probe logs, against group gradients taken one by one; its dispersion."""

import pytest
import torch
from gradients import tiny_policy

import tokenweights as tw
from tokenweights import TokenWeightsError


def metrics_of(batch, model, *, series=None, **options):
    return (series or tw.GradientSeries()).metrics(
        tw.GradientProbe(model, **options),
        lambda: batch.loss(model),
        scores=batch.scores,
        mask=batch.mask,
    )


def exact_metrics(batch):
    model = tiny_policy.policy()
    loss, parameters = batch.loss(model), list(model.parameters())
    groups = tw.quantile_bins(batch.scores, batch.mask, bins=10)
    deciles = tw.group_gradients(loss, groups, parameters, mask=batch.mask)
    expected = {
        f"gradient/decile_{number}": tw.gradient_geometry(own, deciles.total).projection_ratio
        for number, own in enumerate(deciles.groups)
    }
    subsets = {
        "anchor": tw.bottom_fraction(batch.scores, batch.mask),
        "explorer": tw.top_fraction(batch.scores, batch.mask),
        "random": tw.random_fraction(batch.mask, fraction=0.2, seed=0),
    }
    for name, members in subsets.items():
        groups = torch.where(members, 0, -1)
        own = tw.group_gradients(batch.loss(model), groups, parameters, mask=batch.mask)
        geometry = tw.gradient_geometry(own.groups[0], own.total)
        expected |= {f"gradient/{name}_{field}": v for field, v in vars(geometry).items()}
    return expected


def engine(model):
    """One flat gradient, as an engine hands it out."""

    def gradients():
        flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        model.zero_grad()
        return [flat]

    return {"gradients": gradients}


@pytest.mark.parametrize("flat", [False, True])
def test_metrics_agree_with_gradients_of_each_group(flat):
    batch, model = tiny_policy.Batch(), tiny_policy.policy()
    found = metrics_of(batch, model, **(engine(model) if flat else {}))
    expected = exact_metrics(batch)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    bands = {"low": range(3), "middle": range(3, 7), "high": range(7, 10)}
    for band, numbers in bands.items():
        share = sum(expected[f"gradient/decile_{number}"] for number in numbers)
        assert found[f"gradient/{band}_share"] == pytest.approx(share, abs=1e-3)
    if flat:
        assert found["gradient/sum_error"] < 1e-12  # backward passes add up
    else:
        assert 1e-12 < found["gradient/sum_error"] < 1e-3  # differences do so after scaling
    assert found["gradient/anchor_cosine_std"] == found["gradient/anchor_cosine_cv"] == 0


@pytest.mark.parametrize("parameters", [False, True], ids=["autocast", "parameters"])
def test_low_precision_is_measured_by_backward_passes_and_with_more_tolerance(parameters):
    batch = tiny_policy.Batch(dtype=torch.float32)
    model = tiny_policy.policy(torch.bfloat16 if parameters else torch.float32)

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=not parameters):
            return batch.loss(model).float()

    def metrics(**options):
        probe = tw.GradientProbe(model)
        return tw.GradientSeries().metrics(
            probe, loss, scores=batch.scores, mask=batch.mask, **options
        )

    lower = {} if parameters else {"autocast": torch.bfloat16}
    found, expected = metrics(**lower), exact_metrics(tiny_policy.Batch())
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=0.05)
    assert 1e-5 < found["gradient/sum_error"] < 0.03
    with pytest.raises(TokenWeightsError, match="sum to one within 1e-06"):
        metrics(**lower, tolerance=1e-6)
    with pytest.raises(TokenWeightsError, match="above float16, got torch"):
        metrics(autocast=torch.float16) if not parameters else metrics_of(batch, model.half())


def test_the_dispersion_runs_over_probes_and_goes_on_from_a_saved_state():
    series, cosines, steps = tw.GradientSeries(), [], []
    for seed in range(3):
        batch, model = tiny_policy.Batch(), tiny_policy.policy()
        batch.advantages += seed
        steps.append(metrics_of(batch, model, series=series))
        cosines.append(steps[-1]["gradient/explorer_cosine"])
        if seed == 1:
            saved = series.state_dict()
            series = tw.GradientSeries()
            series.load_state_dict(saved)
    spread = float(torch.tensor(cosines, dtype=torch.float64).std(correction=0))
    assert spread > 1e-3 and steps[2]["gradient/explorer_cosine_std"] == pytest.approx(spread)
    with pytest.raises(TokenWeightsError, match="keys"):
        series.load_state_dict({"anchor": saved["anchor"]})


@pytest.mark.parametrize("flat", [False, True])
def test_a_zero_gradient_has_a_length_and_nothing_else(flat):
    batch, model, series = tiny_policy.Batch(), tiny_policy.policy(), tw.GradientSeries()
    batch.advantages *= 0
    options = engine(model) if flat else {}
    assert metrics_of(batch, model, series=series, **options) == {"gradient/full_norm": 0.0}
    assert series.cosines["anchor"].count == 0


def test_unclipped_losses_go_on_where_a_clip_would_stop():
    old, mask = torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool)
    now = torch.full((3, 2), 2.0)
    for advantages in (torch.tensor([1.0, -1.0, 0.5]), torch.randn(3, 2)):
        parts = tw.unclipped_losses(
            lambda rows: now[rows], old, advantages, mask, micro_batch_size=2
        )
        wide = advantages if advantages.dim() == 2 else advantages[:, None]
        loss = torch.cat([part() for part in parts])
        torch.testing.assert_close(loss, -wide * now.exp())
    with pytest.raises(TokenWeightsError, match="micro_batch_size"):
        tw.unclipped_losses(lambda rows: now[rows], old, advantages, mask, micro_batch_size=0)
