"""A probed run trains as an unprobed one, bit for bit, and logs what the gradients are."""

from dataclasses import fields

import pytest
import tiny
import tokenweights as tw
import torch
from tokenweights import TokenWeightsConfig, TokenWeightsError
from tokenweights.report.records import read_metrics
from trl import GRPOConfig, GRPOTrainer

from tokenweights_trl import (
    GradientProbeMixin,
    TokenWeightsGRPOConfig,
    TokenWeightsGRPOTrainer,
    TokenWeightsMixin,
)


class Probed(GradientProbeMixin, GRPOTrainer):
    gradient_probe_steps = 2


class ProbedWeights(TokenWeightsMixin, GradientProbeMixin, GRPOTrainer):
    gradient_probe_steps = 2


def state(trainer) -> list[torch.Tensor]:
    tensors = list(trainer.model.state_dict().values())
    for slots in trainer.optimizer.state_dict()["state"].values():
        tensors += [value for value in slots.values() if isinstance(value, torch.Tensor)]
    return [*tensors, torch.get_rng_state()]


@pytest.mark.parametrize(("checkpointing", "bf16"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("weighted", [True, False])
def test_training_is_bitwise_the_same_with_and_without(tmp_path, checkpointing, bf16, weighted):
    plain, probed, config = GRPOTrainer, Probed, GRPOConfig
    changes = {"max_steps": 4, "gradient_checkpointing": checkpointing, "bf16": bf16}
    if weighted:
        plain, probed, config = TokenWeightsGRPOTrainer, ProbedWeights, TokenWeightsGRPOConfig
        changes["recipe"] = {"name": "low2high", "warmup_steps": 2}
    states = []
    for kind in (plain, probed):
        model = tiny.policy(attention_dropout=0.2)
        trainer = tiny.trainer(kind, config, tmp_path, model=model, **changes)
        trainer.train()
        states.append(state(trainer))
    assert len(states[0]) > 100
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert trainer._series.cosines["anchor"].count == 2  # it did probe: after steps 1 and 3


def test_the_series_holds_the_geometry_of_the_probe_batch(tmp_path):
    class Recorded(Probed):
        gradient_probe_file = str(tmp_path / "gradient.jsonl")
        seen = ()

        def _probed(self, batch):
            loss = torch.cat([part() for part in self._losses_of(batch)])
            mask = batch["completion_mask"].bool()
            scores, _ = self._scored(batch)
            groups = tw.quantile_bins(scores, mask, bins=10)
            anchors = torch.where(tw.bottom_fraction(scores, mask), 0, -1)
            parameters = list(self.model.parameters())
            deciles, own = (
                tw.group_gradients(loss, kind, parameters, mask=mask) for kind in (groups, anchors)
            )
            expected = {
                f"gradient/decile_{number}": tw.gradient_geometry(g, deciles.total).projection_ratio
                for number, g in enumerate(deciles.groups)
            }
            geometry = tw.gradient_geometry(own.groups[0], own.total)
            expected |= {f"gradient/anchor_{name}": v for name, v in vars(geometry).items()}
            metrics = super()._probed(batch)
            self.seen += ((expected, metrics, {key: v.clone() for key, v in batch.items()}),)
            return metrics

        def _losses_of(self, batch):
            return self._token_losses(self.model, batch, self._scored(batch)[1])

    trainer = tiny.trainer(Recorded, GRPOConfig, tmp_path, max_steps=3)
    trainer.train()
    lines = read_metrics(tmp_path / "gradient.jsonl")
    assert [line["step"] for line in lines] == [1, 3] and len(trainer.seen) == 2
    for line, (expected, metrics, batch) in zip(lines, trainer.seen, strict=True):
        assert metrics.items() <= line.items()
        got = {name: metrics[name] for name in expected}
        assert got == pytest.approx(expected, rel=1e-2, abs=1e-4)
        assert sum(metrics[f"gradient/decile_{n}"] for n in range(10)) == pytest.approx(1, abs=1e-3)
        for key, value in trainer.seen[0][2].items():
            assert torch.equal(value, batch[key])
    first, last = (line["gradient/anchor_cosine"] for line in lines)
    assert first != last
    assert lines[1]["gradient/anchor_cosine_std"] == pytest.approx(abs(first - last) / 2)
    logged = [e for e in trainer.state.log_history if "gradient/decile_0" in e]
    assert [entry["step"] for entry in logged] == [1, 3]
    assert float(logged[1]["gradient/full_norm"]) == pytest.approx(lines[1]["gradient/full_norm"])


@pytest.mark.parametrize("parameters", [False, True], ids=["autocast", "parameters"])
def test_bfloat16_rounds_and_no_more(tmp_path, parameters):
    still = {"max_steps": 1, "learning_rate": 0.0}
    model = tiny.policy().bfloat16() if parameters else None
    rounded = tiny.trainer(Probed, GRPOConfig, tmp_path, model=model, bf16=not parameters, **still)
    rounded.train()
    exact = tiny.trainer(Probed, GRPOConfig, tmp_path, **still)
    exact._probe_batch = rounded._probe_batch
    exact.train()
    found, expected = (trainer.state.log_history[0] for trainer in (rounded, exact))
    for name in ("full_norm", "anchor_cosine", "explorer_cosine", "low_share", "high_share"):
        name = f"gradient/{name}"
        assert float(found[name]) == pytest.approx(float(expected[name]), abs=0.05, rel=0.05)
    assert 1e-5 < float(found["gradient/sum_error"]) < 0.03


def test_float16_is_refused(tmp_path, monkeypatch):
    trainer = tiny.trainer(Probed, GRPOConfig, tmp_path, max_steps=1)
    monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")  # needs a GPU
    with pytest.raises(TokenWeightsError, match="above float16"):
        trainer.train()


def test_the_probe_batch_has_plain_advantages(tmp_path):
    trainer = tiny.trainer(
        ProbedWeights, TokenWeightsGRPOConfig, tmp_path, recipe="anchor20", max_steps=1
    )
    trainer.train()
    advantages = trainer._probe_batch["advantages"]
    assert advantages.dim() == 1 and (advantages != 0).any()


def test_no_probe_without_an_advantage(tmp_path):
    trainer = tiny.trainer(Probed, GRPOConfig, tmp_path, mask_truncated_completions=False)
    trainer.reward_funcs = [lambda completion_ids, **_: [0.0] * len(completion_ids)]
    trainer.train()
    assert trainer._probe_batch is None


def test_nonsense_is_refused(tmp_path):
    class Never(Probed):
        gradient_probe_steps = 0

    with pytest.raises(TokenWeightsError, match="gradient_probe_steps"):
        tiny.trainer(Never, GRPOConfig, tmp_path)
    for changes, message in (
        ({"gradient_probe_steps": 0}, "`gradient_probe_steps` >= 1, got 0"),
        ({"gradient_probe_file": "gradient.jsonl"}, "Set gradient_probe_steps too"),
        ({"metrics_file": "run.jsonl", "token_records": "run.jsonl"}, "a file of its own"),
    ):
        with pytest.raises(TokenWeightsError, match=message):
            tiny.arguments(TokenWeightsGRPOConfig, tmp_path, recipe="low2high", **changes)


def test_options_are_those_of_every_adapter(tmp_path):
    own = {option.name: option for option in fields(TokenWeightsGRPOConfig)}
    for option in fields(TokenWeightsConfig):
        assert own[option.name].default == option.default
        assert own[option.name].metadata["help"] == option.metadata["help"]
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("metrics_file", "token_records")}
    files["gradient_probe_file"] = str(tmp_path / "gradient.jsonl")
    made = {"recipe": "low2high", "max_steps": 3, "gradient_probe_steps": 2}
    trainer = tiny.trainer(
        TokenWeightsGRPOTrainer, TokenWeightsGRPOConfig, tmp_path, **made, **files
    )
    trainer.train()
    assert [line["step"] for line in read_metrics(files["gradient_probe_file"])] == [1, 3]
    lines, history = read_metrics(files["metrics_file"]), trainer.state.log_history
    assert [line["step"] for line in lines] == [entry["step"] for entry in history] == [1, 2, 3, 3]
    for line, entry in zip(lines, history, strict=True):
        for name in ("token_weights/weight_mean", "gradient/full_norm", "reward", "grad_norm"):
            assert (name in line) == (name in entry)
            assert name not in line or line[name] == pytest.approx(float(entry[name]))
    assert len({*map(frozenset, lines)}) > 1 and (tmp_path / "token_records.jsonl").exists()
    quiet = tiny.trainer(TokenWeightsGRPOTrainer, TokenWeightsGRPOConfig, tmp_path, recipe="full")
    quiet.train()
    assert quiet._probe_batch is None
