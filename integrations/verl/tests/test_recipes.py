"""Every named recipe trains on VeRL's real trainer, or is refused by name; and one of one's own."""

import json
import math
import os
import subprocess
import sys

import pytest
import tokenweights as tw
import torch
from batches import nested
from configured import composed
from cpu_platform import ENVIRONMENT
from swapping import SAMPLED, SWAPPED
from tensordict import TensorDict
from test_trainer import run
from tokenweights import TokenWeightsError

from tokenweights_verl.config import token_weights_config
from tokenweights_verl.scores import ENTROPY, rollout_batch

# What no setting of VeRL gives, and who reads it.
NEVER = {
    "loss_low20": "loss_magnitude",
    "loss_high20": "loss_magnitude",
    "certainty_shaping": "`self_certainty`",
}
SAMPLER = "actor_rollout_ref.rollout.calculate_log_probs"
ROLLOUT_IS = "algorithm.rollout_correction.rollout_is"


def test_each_named_recipe_is_trained_or_refused():
    assert {*SWAPPED, *SAMPLED, *NEVER} == set(tw.recipe_names())


@pytest.mark.parametrize("name", NEVER)
def test_a_recipe_that_verl_cannot_serve_is_refused(name):
    with pytest.raises(TokenWeightsError) as error:
        token_weights_config(composed(f"token_weights.recipe={name}"))
    assert NEVER[name] in str(error.value)


@pytest.mark.parametrize("name", SAMPLED)
def test_the_samplers_log_probs_have_to_be_asked_for(name):
    asked = f"token_weights.recipe={name}"
    with pytest.raises(TokenWeightsError, match="`sampler_log_probs`"):
        token_weights_config(composed(asked, f"{SAMPLER}=false"))
    assert token_weights_config(composed(asked, f"{SAMPLER}=true")).recipe == name


def test_the_ratio_to_the_sampler_is_not_corrected_twice():
    asked = ["token_weights.recipe=sampler_ratio_band", f"{SAMPLER}=true", f"{ROLLOUT_IS}=token"]
    with pytest.raises(TokenWeightsError, match="rollout_is"):
        token_weights_config(composed(*asked))


def test_the_reference_is_a_column_where_there_is_one():
    signal = "token_weights.recipe={rule: entropy_rule, signal: reference_divergence}"
    signal = signal.replace("entropy_rule", "{kind: damped}")
    with pytest.raises(TokenWeightsError, match="`reference_log_probs`"):
        token_weights_config(composed(signal))
    token_weights_config(composed(signal, "actor_rollout_ref.actor.use_kl_loss=true"))


def rows(order):
    """Fields of seven responses to three prompts as VeRL holds them, in an order."""
    generator = torch.Generator().manual_seed(0)
    lengths, prompts = [5, 3, 8, 1, 6, 4, 7], [0, 0, 0, 1, 1, 2, 2]
    made = []
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        values = torch.rand(5, length, generator=generator)
        whole = torch.rand(2 + length, generator=generator)
        ids = torch.randint(0, 9, (length,), generator=generator)
        made.append((row, length, prompt, values, whole, ids))
    made = [made[row] for row in order]
    fields = {
        "response_mask": [torch.ones(length, dtype=torch.long) for _, length, *_ in made],
        "prompts": [torch.tensor([prompt, 1]) for _, _, prompt, *_ in made],
        "responses": [ids for *_, ids in made],
        "advantages": [(values[:1] * 4 - 2)[0, :1].expand(n) for _, n, _, values, *_ in made],
        "old_log_probs": [-3 * values[1] for *_, values, _, _ in made],
        "entropy": [values[2] / 3 for *_, values, _, _ in made],
        "rollout_log_probs": [-3 * values[3] for *_, values, _, _ in made],
        ENTROPY.format(0): [whole for *_, whole, _ in made],
    }
    data = {name: nested(parts) for name, parts in fields.items()}
    keys = [f"{prompt}_{row}_0" for row, _, prompt, *_ in made]
    return keys, TensorDict(data, batch_size=len(made))


@pytest.mark.parametrize("name", sorted({*SWAPPED, *SAMPLED}))
def test_weights_do_not_depend_on_the_order_of_rows(name):
    recipe, order = tw.recipe(name).placed(1 if "_layer" not in name else 40), [4, 0, 6, 2, 5, 1, 3]
    straight, mixed = (
        recipe.weighted(rollout_batch(recipe, 7, *rows(places)), step=30)
        for places in (range(7), order)
    )
    width = mixed.weights.shape[1]
    torch.testing.assert_close(mixed.weights, straight.weights[order, :width], rtol=1e-6, atol=0)
    torch.testing.assert_close(mixed.scale, straight.scale)


def test_every_named_recipe_trains(tmp_path):
    """One run takes another recipe every two steps."""
    more = ["trainer.v1.trainer_mode=tokenweights_swapping", "data.train_batch_size=2"]
    more += ["actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.rollout.n=4"]
    steps, modules = 2 * len(SWAPPED), "cpu_platform,swapping"
    metrics = run(tmp_path, steps, 1, *more, modules=modules, timeout=1500)
    assert sorted(metrics) == list(range(1, steps + 1))
    for place, name in enumerate(SWAPPED):
        for step in (2 * place + 1, 2 * place + 2):
            weight, norm = (
                metrics[step][key] for key in ("token_weights/weight_mean", "actor/grad_norm")
            )
            assert weight >= 0 and math.isfinite(weight) and math.isfinite(norm), name


MODULE = """
from dataclasses import dataclass


@dataclass(frozen=True)
class Doubt:
    columns = ("log_probs", "predictive_entropy")

    def __call__(self, batch):
        return (-batch.log_probs - batch.predictive_entropy).clamp(min=0)


@dataclass(frozen=True)
class Doubted:
    gamma: float = 0.3

    def __call__(self, scores, batch, *, step, group=None):
        return 1 + self.gamma * scores
"""
OWN = '{signal: "verl_rules:Doubt", rule: {kind: "verl_rules:Doubted", gamma: 0.5}}'


def test_a_recipe_of_a_users_own_is_found_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "verl_rules.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    made = token_weights_config(composed(f"token_weights.recipe={OWN}")).token_recipe
    weighted = made.weighted(rollout_batch(made, 7, *rows(range(7))), step=0)
    assert weighted.weights.max() > 1
    sys.modules.pop("verl_rules")


def test_a_misspelt_path_fails_before_workers_start(tmp_path):
    (tmp_path / "verl_rules.py").write_text(MODULE)
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    result = subprocess.run(
        [
            *(sys.executable, "-m", "tokenweights_verl.train"),
            f"token_weights.recipe={OWN.replace('Doubted', 'Doubtd')}",
            f"hydra.run.dir={tmp_path}",
        ],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert result.returncode == 1
    assert "Did you mean 'Doubted'" in result.stderr, json.dumps(result.stderr[-3000:])
    assert "ray" not in result.stdout.lower()
