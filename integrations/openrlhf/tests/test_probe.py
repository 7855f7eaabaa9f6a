"""The gradient probe finds what the formulas say, and training does not notice it."""

import pytest
import ray
import reference
import tiny
import torch
from tokenweights import TokenWeightsConfig
from tokenweights.report.records import read_metrics

from tokenweights_openrlhf import GradientProbePolicyActor
from tokenweights_openrlhf.config import checked_arguments
from tokenweights_openrlhf.probe import probe_batches

ProbeActor = ray.remote(num_gpus=1)(GradientProbePolicyActor)
CHECKPOINTED = ("--actor.gradient_checkpointing_enable",)
LORA = ("--ds.lora.rank", 4)
LAYOUTS = [
    pytest.param(1, 2, False, (), id="1-zero2"),
    pytest.param(2, 2, True, (), id="2-zero2-packed"),
    pytest.param(2, 3, False, (), id="2-zero3"),
    pytest.param(1, 3, True, CHECKPOINTED, id="1-zero3-packed-checkpointed"),
]


def by_hand(policy, responses):
    """Length, norm ratios and cosines of the lowest and highest fifth, in float64."""
    model, found = reference.read(policy, responses)
    advantages, parameters = reference.group_advantages(responses), list(model.parameters())
    kept = [row for row, advantage in enumerate(advantages) if advantage != 0]
    count = sum(len(found[row]["log_probs"]) for row in kept)

    def gradient(weights):
        losses = [
            -advantages[row] * (torch.tensor(weights[row]).double() @ found[row]["log_probs"])
            for row in kept
        ]
        parts = torch.autograd.grad(sum(losses) / count, parameters, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    full = gradient([[1.0] * len(signals["log_probs"]) for signals in found])
    result = {"full_norm": float(full.norm())}
    for name, sign in (("anchor", 1), ("explorer", -1)):
        scores = [[sign * value for value in signals["attention"]] for signals in found]
        subset = gradient(reference.lowest_fifth(scores))
        result[f"{name}_norm_ratio"] = float(subset.norm() / full.norm())
        result[f"{name}_cosine"] = float(subset @ full / subset.norm() / full.norm())
    return result


def arguments(policy, ranks, zero, packed, *options, file=None, **probe):
    made = tiny.arguments(policy, "--ds.zero_stage", zero, *options, ranks=ranks, packed=packed)
    config = TokenWeightsConfig("low2high", gradient_probe_file=file, **probe)
    return checked_arguments(made, config)


def run(actors, args, monkeypatch, steps):
    monkeypatch.setattr(tiny, "WeightedActor", ProbeActor)
    return tiny.trained(actors, args, steps=steps)


@pytest.mark.parametrize(("ranks", "zero", "packed", "options"), LAYOUTS)
def test_metrics_are_those_of_the_formulas(
    actors, policy, tmp_path, monkeypatch, ranks, zero, packed, options
):
    still = ("--actor.adam.lr", 0)  # so that the policy after the step is the one before it
    file = tmp_path / "gradient.jsonl"
    args = arguments(
        policy, ranks, zero, packed, *options, *still, gradient_probe_steps=2, file=str(file)
    )
    statuses, _ = run(actors, args, monkeypatch, 3)
    responses = list(tiny.responses())
    wanted = by_hand(policy, responses)
    lines = read_metrics(file)
    assert [line["step"] for line in lines] == [1, 3]
    for line, status in zip(lines, statuses[::2], strict=True):
        assert {name: line[f"gradient/{name}"] for name in wanted} == pytest.approx(
            wanted, rel=1e-4
        )
        assert sum(line[f"gradient/decile_{n}"] for n in range(10)) == pytest.approx(1, abs=1e-4)
        assert all(status[name] == line[name] for name in line if name != "step")
    assert not any(name.startswith("gradient/") for name in statuses[1])


def test_experts_are_probed_below_zero3_and_refused_at_it(actors, tmp_path, monkeypatch):
    tiny.save_policy(tmp_path, experts=16)
    args = arguments(str(tmp_path), 2, 2, False, "--actor.adam.lr", 0, gradient_probe_steps=1)
    (status,), _ = run(actors, args, monkeypatch, 1)
    wanted = by_hand(tmp_path, list(tiny.responses()))
    assert {name: status[f"gradient/{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    args.ds.zero_stage = 3
    with pytest.raises(Exception, match="expected `model` without experts at ZeRO-3"):
        run(actors, args, monkeypatch, 1)


def test_bfloat16_rounds_and_no_more(actors, policy, monkeypatch):
    args = arguments(policy, 2, 3, True, "--actor.adam.lr", 0, gradient_probe_steps=1)
    args.ds.param_dtype = "bf16"
    (status,), _ = run(actors, args, monkeypatch, 1)
    for name, value in by_hand(policy, list(tiny.responses())).items():
        assert status[f"gradient/{name}"] == pytest.approx(value, rel=0.05)
    assert 0 < status["gradient/sum_error"] < 0.03


# Two trainings each, so only where ranks, stage and checkpointing all differ, and with adapters.
@pytest.mark.parametrize(
    ("ranks", "zero", "packed", "options"),
    [*LAYOUTS[1::2], pytest.param(2, 2, True, LORA, id="2-zero2-packed-lora")],
)
def test_training_is_the_same_bit_for_bit(
    actors, policy, monkeypatch, ranks, zero, packed, options
):
    adam = ("--actor.adam.lr", 1e-2, "--actor.adam.eps", 1e-8, "--actor.adam.betas", 0.9, 0.95)
    adam = (*adam, "--train.batch_size", 8)  # two optimizer steps for each rollout batch

    def trained(steps):
        args = arguments(policy, ranks, zero, packed, *options, *adam, gradient_probe_steps=steps)
        return run(actors, args, monkeypatch, 3)

    (off, before), (on, after) = trained(None), trained(1)
    assert all(status["gradient/full_norm"] > 0 for status in on)
    for one, other in zip(off, on, strict=True):
        names = [name for name in one if not name.startswith("timing/")]
        assert [one[name] for name in names] == [other[name] for name in names]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_each_rank_has_as_many_rows_and_the_last_may_be_without_a_token():
    rows = {
        "sequences": torch.arange(8).view(4, 2),
        "advantages": torch.tensor([[1.0], [0.0], [-1.0], [2.0]]),
        "action_mask": torch.ones(4, 1),
    }
    first, second = probe_batches(rows, 2)
    assert first["sequences"].tolist() == [[0, 1], [4, 5]]
    assert second["sequences"].tolist() == [[6, 7], [0, 1]]
    assert second["action_mask"].tolist() == [[1], [0]]
    assert rows["action_mask"].all()
    assert probe_batches(rows | {"advantages": torch.zeros(4, 1)}, 2) == []
