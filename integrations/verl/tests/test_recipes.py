"""Every named recipe trains on VeRL's real trainer, or is refused by name; and one of one's own."""

import math
import os
import subprocess
import sys

import pytest
import tokenweights as tw
import torch
from batches import nested
from configured import composed, with_recipe
from cpu_platform import ENVIRONMENT
from tensordict import TensorDict
from test_trainer import run
from tokenweights import TokenWeightsError
from trainer_run import FLOAT32

from tokenweights_verl.config import token_weights_config
from tokenweights_verl.scores import COLUMNS, ENTROPY, rollout_batch

SAMPLER = "actor_rollout_ref.rollout.calculate_log_probs"
REFERENCE = "actor_rollout_ref.actor.use_kl_loss"
ROLLOUT_IS = "algorithm.rollout_correction.rollout_is"
# Training steps of each recipe in a run that takes one after another.
STEPS = 2
# What runs as VeRL comes, with nothing but rewards and old log-probabilities.
PLAIN = (
    *("full", "random20", "bernoulli20", "anchor20", "explorer20"),
    *("anchor20_all_tokens", "explorer20_all_tokens", "low2high", "low2high_layer8"),
    *("low2high_layer20", "low2high_layer31", "high2low", "static_anchor", "static_explorer"),
    *("front20", "back20", "predictive_low20", "predictive_high20", "type_matched20"),
    *("position_matched20", "predictive_high20_batch", "predictive_high20_batch_all_tokens"),
    *("predictive_above80_batch", "predictive_above80_batch_all_tokens", "surprisal_boost10"),
    *("surprisal_boost10_damp10", "probability_weighted", "entropy_proportional"),
    *("covariance_drop", "entropy_bonus", "position_bonus", "perplexity_shaping"),
    *("relative_surprisal_band", "positive_high_entropy50", "positive_low_entropy50"),
    *("negative_high_entropy50", "negative_low_entropy50", "rare_positives_drop"),
    *("rare_positives_drop_older", "entropy_change_damped", "preplan_anchor40", "preplan40"),
    *("future_anchor40", "preplan_anchor40_coupled", "random_credit40", "entropy_credit40"),
)
# What needs one setting more, and the column that this gives.
WITH = {
    "sampler_ratio_truncated": (SAMPLER, "sampler_log_probs"),
    "sampler_ratio_band": (SAMPLER, "sampler_log_probs"),
    "second_moment_drop": (SAMPLER, "sampler_log_probs"),
}
# What no setting gives, and the reason in the message.
REFUSED = {
    "loss_low20": r"\|loss\| is \|advantage\|",
    "loss_high20": r"\|loss\| is \|advantage\|",
    "certainty_shaping": "'response_certainty' reads `self_certainty`",
}
# No named recipe reads the reference.
DIVERGENCE = "{rule: {kind: damped}, signal: reference_divergence}"
# Layers that the embedded policy has in place of those of the paper's models.
SMALL = {name: f"{{name: {name}, layers: [-1]}}" for name in PLAIN if "_layer" in name}


def test_each_named_recipe_is_trained_or_refused():
    assert sorted([*PLAIN, *WITH, *REFUSED]) == sorted(tw.recipe_names())


@pytest.mark.parametrize("name", PLAIN)
def test_the_plainest_configuration_serves_most(name):
    plain = with_recipe(name, f"{SAMPLER}=false", f"{REFERENCE}=false")
    assert token_weights_config(plain).token_recipe == tw.recipe(name)


@pytest.mark.parametrize("name", REFUSED)
def test_a_recipe_that_verl_cannot_serve_is_refused(name):
    settings = [f"{SAMPLER}=true", f"{REFERENCE}=true"]
    with pytest.raises(TokenWeightsError, match=REFUSED[name]):
        token_weights_config(composed(f"token_weights.recipe={name}", *settings))


@pytest.mark.parametrize(
    ("recipe", "setting", "column"),
    [
        *((name, *WITH[name]) for name in WITH),
        (DIVERGENCE, REFERENCE, "reference_log_probs"),
        (DIVERGENCE, "algorithm.use_kl_in_reward", "reference_log_probs"),
    ],
)
def test_a_column_has_to_be_asked_for(recipe, setting, column):
    asked = f"token_weights.recipe={recipe}"
    with pytest.raises(TokenWeightsError, match=f"reads `{column}`"):
        token_weights_config(composed(asked, f"{setting}=false"))
    assert column in token_weights_config(composed(asked, f"{setting}=true")).token_recipe.columns


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", ["sampler_ratio_truncated", "sampler_ratio_band"])
def test_the_ratio_to_the_sampler_is_not_corrected_twice(name, level):
    asked = [f"token_weights.recipe={name}", f"{SAMPLER}=true"]
    with pytest.raises(TokenWeightsError, match=f"`{ROLLOUT_IS}`.*got '{level}'.*both multiply"):
        token_weights_config(composed(*asked, f"{ROLLOUT_IS}={level}"))
    # A mask is no correction, and VeRL may correct what other recipes weigh.
    for other in ("second_moment_drop", "low2high"):
        asked[0] = f"token_weights.recipe={other}"
        token_weights_config(composed(*asked, f"{ROLLOUT_IS}={level}"))


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
        # Some tokens are improbable, as rules for such tokens want them.
        "old_log_probs": [-12 * values[1] ** 4 for *_, values, _, _ in made],
        "entropy": [values[2] / 3 for *_, values, _, _ in made],
        "rollout_log_probs": [-12 * values[1] ** 4 + values[3] - 0.5 for *_, values, _, _ in made],
        "ref_log_prob": [-3 * values[4] for *_, values, _, _ in made],
        "rm_scores": [values[4] for *_, values, _, _ in made],
        ENTROPY.format(0): [whole for *_, whole, _ in made],
        ENTROPY.format("0_distance_10"): [9 * whole for *_, whole, _ in made],
        ENTROPY.format("0_received_10_50"): [1 - whole for *_, whole, _ in made],
    }
    data = {name: nested(parts) for name, parts in fields.items()}
    keys = [f"{prompt}_{row}_0" for row, _, prompt, *_ in made]
    return keys, TensorDict(data, batch_size=len(made))


def test_columns_are_verls_fields():
    keys, data = rows(range(7))
    batch = rollout_batch(tw.recipe("low2high").placed(1), 7, keys, data)
    assert {*batch.filled} == {*COLUMNS, "mask", "sample_ids", "prompt_ids", "attention"}
    assert batch.prompt_ids.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert len(set(batch.sample_ids.tolist())) == 7
    for name, field in COLUMNS.items():
        found, expected = getattr(batch, name), data[field].unbind()
        for row, values in enumerate(expected):
            own = found[row, : len(values)] if name != "rewards" else found[row]
            torch.testing.assert_close(own, values if name != "rewards" else values.sum())


@pytest.mark.parametrize("name", [*PLAIN, *WITH])
def test_weights_do_not_depend_on_the_order_of_rows(name):
    order, fields = [4, 0, 6, 2, 5, 1, 3], {"name": name}
    fields |= {"layers": [-1]} if name in SMALL else {}
    recipe = tw.recipe(fields).placed(1)
    straight, mixed = (
        recipe.weighted(rollout_batch(recipe, 7, *rows(places)), step=30)
        for places in (range(7), order)
    )
    width = mixed.weights.shape[1]
    torch.testing.assert_close(mixed.weights, straight.weights[order, :width], rtol=1e-6, atol=0)
    torch.testing.assert_close(mixed.scale, straight.scale)
    mask = rollout_batch(recipe, 7, *rows(range(7))).mask
    assert name == "full" or straight.weights[mask].unique().numel() > 1, "nothing was weighed"


def trained(folder, recipes, *settings, modules="cpu_platform,swapping"):
    """The metrics of the steps of each recipe, of one run that takes one after another."""
    more = ["trainer.v1.trainer_mode=tokenweights_swapping", "data.train_batch_size=2"]
    more += ["actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.rollout.n=4"]
    more += [f"+swapped=[{','.join(recipes)}]", *settings]
    steps = STEPS * len(recipes)
    metrics = run(folder, steps, 1, *more, modules=modules)
    assert sorted(metrics) == list(range(1, steps + 1))
    for step, logged in metrics.items():
        weight, norm = logged["token_weights/weight_mean"], logged["actor/grad_norm"]
        name = recipes[(step - 1) // STEPS]
        assert weight >= 0 and math.isfinite(weight) and math.isfinite(norm), name
    return [
        [metrics[STEPS * place + step] for step in range(1, STEPS + 1)]
        for place in range(len(recipes))
    ]


def test_every_named_recipe_trains_in_the_plainest_configuration(tmp_path):
    trained(tmp_path, [SMALL.get(name, name) for name in PLAIN])


MODULE = """
import os
from dataclasses import dataclass

import torch

assert "RANK" not in os.environ, "a worker needs no class of a user's"


@dataclass(frozen=True)
class Doubt:
    columns = ("log_probs", "predictive_entropy")

    def __call__(self, batch):
        return (-batch.log_probs - batch.predictive_entropy).clamp(min=0)


@dataclass(frozen=True)
class Doubted:
    gamma: float = 0.3
    columns = ("rewards", "advantages")

    def __call__(self, scores, batch, *, step, group=None):
        for prompt in batch.prompt_ids.unique():
            own = batch.prompt_ids == prompt
            rewards = batch.rewards[own]
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            found = batch.advantages[own, 0]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        return 1 + self.gamma * scores
"""
OWN = "rule: {kind: 'verl_rules:Doubted', gamma: 0.5}"
SIGNAL = "{kind: mean_of, signals: [{kind: 'verl_rules:Doubt'}, attention_entropy]}"


def test_columns_that_settings_give_and_a_recipe_of_a_users_own(tmp_path):
    """The user's rule checks VeRL's advantages against the rewards of each prompt's responses."""
    (tmp_path / "verl_rules.py").write_text(MODULE)
    settings = [f"{SAMPLER}=true", f"{REFERENCE}=true", "actor_rollout_ref.rollout.top_p=1"]
    settings += [f"+actor_rollout_ref.ref.fsdp_config.mixed_precision={FLOAT32}"]
    own = f"{{signal: {SIGNAL}, {OWN}}}"
    first, *_, mine, ratio, last = trained(
        tmp_path,
        [
            DIVERGENCE,
            "second_moment_drop",
            "sampler_ratio_band",
            own,
            "sampler_ratio_truncated",
            DIVERGENCE,
        ],
        *settings,
    )
    # The reference is the policy of the first step, and no later one.
    assert first[0]["token_weights/score_mean"] == pytest.approx(0, abs=1e-6)
    assert last[0]["token_weights/score_mean"] > 1e-6
    assert all(metrics["token_weights/weight_mean"] > 1 for metrics in mine)
    # The engines of both are on one CPU: but for rounding the ratio of each token is one.
    for metrics in ratio:
        assert metrics["token_weights/score_mean"] == pytest.approx(1, abs=1e-3)
        assert metrics["token_weights/score_std"] < 1e-3


def test_a_misspelt_path_fails_before_workers_start(tmp_path):
    (tmp_path / "verl_rules.py").write_text(MODULE)
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    wrong = OWN.replace("Doubted", "Doubtd")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "tokenweights_verl.train"),
            f"token_weights.recipe={{signal: {SIGNAL}, {wrong}}}",
            f"hydra.run.dir={tmp_path}",
        ],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert result.returncode == 1
    assert "Did you mean 'Doubted'" in result.stderr, result.stderr[-3000:]
    assert "ray" not in result.stdout.lower()
