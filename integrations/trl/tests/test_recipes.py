"""Every named recipe trains, or is refused by name; and so does one of a user's own."""

import sys

import pytest
import tiny
import tokenweights as tw
import torch
from tokenweights import TokenWeightsError
from tokenweights.recipes import signals
from transformers import AutoModelForCausalLM

from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer

# What a rollout batch of TRL does not have, and who reads it.
REFUSED = {
    "loss_low20": "loss_magnitude",
    "loss_high20": "loss_magnitude",
    "certainty_shaping": "`self_certainty`",
    # vLLM alone gives them.
    "sampler_ratio_truncated": "`sampler_log_probs`",
    "sampler_ratio_band": "`sampler_log_probs`",
    "second_moment_drop": "`sampler_log_probs`",
}
# Layers that the tiny model does not have.
LAYERS = {f"low2high_layer{layer}": {"layers": 1} for layer in (8, 20, 31)}

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


class Recorder(TokenWeightsGRPOTrainer):
    seen = ()

    def _batch(self, output, columns):
        batch = super()._batch(output, columns)
        self.seen += (batch,)
        return batch


def trained(folder, **changes):
    trainer = tiny.trainer(Recorder, TokenWeightsGRPOConfig, folder, max_steps=2, **changes)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", [name for name in tw.recipe_names() if name not in REFUSED])
def test_a_named_recipe_trains(tmp_path, name):
    trainer = trained(tmp_path, recipe={"name": name, **LAYERS.get(name, {})})
    logs = [log for log in trainer.state.log_history if "token_weights/weight_mean" in log]
    assert len(logs) == 2 and trainer.seen
    batch = trainer.seen[-1]
    assert set(trainer.recipe.columns) <= set(batch.filled)
    assert batch.prompt_ids.tolist() == (batch.sample_ids // trainer.num_generations).tolist()


@pytest.mark.parametrize("name", REFUSED)
def test_a_recipe_that_trl_cannot_serve_is_refused(tmp_path, name):
    with pytest.raises(TokenWeightsError) as error:
        TokenWeightsGRPOConfig(str(tmp_path), recipe=name, use_cpu=True, bf16=False)
    assert REFUSED[name] in str(error.value)


def test_the_reference_is_a_column_where_there_is_one(tmp_path):
    made = tw.Recipe(
        signal=signals.ReferenceDivergence(), rule=tw.recipe("entropy_proportional").rule
    )
    with pytest.raises(TokenWeightsError, match="`reference_log_probs`"):
        TokenWeightsGRPOConfig(str(tmp_path), recipe=made, use_cpu=True, bf16=False)
    tiny.policy().save_pretrained(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    trainer = trained(tmp_path, model=model, recipe=made, beta=0.1)
    batch = trainer.seen[0]  # before any update the policy is the reference
    same = (batch.reference_log_probs - batch.log_probs)[batch.mask].abs().max()
    assert same < 1e-5


def test_the_ratio_to_the_sampler_is_not_corrected_twice(tmp_path):
    options = {"recipe": "sampler_ratio_band", "use_cpu": True, "bf16": False, "use_vllm": True}
    with pytest.raises(TokenWeightsError, match="`vllm_importance_sampling_correction` False"):
        TokenWeightsGRPOConfig(str(tmp_path), **options)
    made = TokenWeightsGRPOConfig(
        str(tmp_path), **options, vllm_importance_sampling_correction=False
    )
    assert made.token_recipe.name == "sampler_ratio_band"


def test_a_recipe_of_a_users_own_trains(tmp_path, monkeypatch):
    (tmp_path / "trl_rules.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import trl_rules

    made = tw.Recipe(name="doubted", signal=trl_rules.Doubt(), rule=trl_rules.Doubted(0.5))
    text = '{"signal": "trl_rules:Doubt", "rule": {"kind": "trl_rules:Doubted", "gamma": 0.5}}'
    by_object, by_text = (
        trained(tmp_path / kind, recipe=choice, save_steps=1)
        for kind, choice in (("object", made), ("text", text))
    )
    assert by_object.score_source == by_text.score_source == "scoring_pass"
    for one, other in zip(by_object.seen, by_text.seen, strict=True):
        assert torch.equal(one.log_probs, other.log_probs)
    for name, one in by_object.model.state_dict().items():
        assert torch.equal(one, by_text.model.state_dict()[name])
    assert '"kind": "trl_rules:Doubted"' in by_object.args.to_json_string()
    del sys.modules["trl_rules"]


def test_a_misspelt_path_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "trl_rules.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    choice = {"signal": "trl_rules:Doubt", "rule": "trl_rules:Doubtd"}
    with pytest.raises(TokenWeightsError, match="Did you mean 'Doubted'"):
        TokenWeightsGRPOConfig(str(tmp_path), recipe=choice, use_cpu=True, bf16=False)
    sys.modules.pop("trl_rules", None)
