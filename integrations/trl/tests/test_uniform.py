"""Weights of exactly one leave TRL's losses, gradients and parameters as they are, bit for bit."""

import pytest
import tiny
import torch
from trl import GRPOConfig, GRPOTrainer

from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer

# Scores are taken and turned into weights, and all weights come out as one.
SCORED_UNIFORM = {"name": "static_anchor", "low": (1.0, 1.0), "high": (1.0, 1.0)}

CASES = {
    **{loss: {"loss_type": loss} for loss in ("dapo", "grpo", "bnpo", "dr_grpo", "cispo")},
    **{loss: {"loss_type": loss} for loss in ("sapo", "vespo", "luspo")},
    "one generation for two optimizer steps": {"steps_per_generation": 4},
    "two generations for one optimizer step": {"steps_per_generation": 1},
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "no checkpointing": {"gradient_checkpointing": False},
    "truncated completions masked": {"mask_truncated_completions": True},
    "top entropy tokens only": {"top_entropy_quantile": 0.5},
    "padding to a multiple": {"pad_to_multiple_of": 8},
}


def run(trainer_class, config_class, folder, **changes):
    trainer = tiny.trainer(trainer_class, config_class, folder, **changes)
    trainer.train()
    # Loss and gradient norm are exact in the log, before they are rounded for display.
    logged = [
        (float(entry["loss"]), float(entry["grad_norm"]))
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return logged, [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same_training(folder, recipe, changes) -> None:
    plain = run(GRPOTrainer, GRPOConfig, folder, **changes)
    weighted = run(
        TokenWeightsGRPOTrainer, TokenWeightsGRPOConfig, folder, recipe=recipe, **changes
    )
    assert len(plain[0]) >= 2 and all(norm > 0 for _, norm in plain[0])
    assert weighted[0] == plain[0]
    assert all(torch.equal(a, b) for a, b in zip(weighted[1], plain[1], strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recipe", ["full", SCORED_UNIFORM], ids=["unscored", "scored"])
def test_uniform_weights_are_plain_grpo(tmp_path, case, recipe):
    same_training(tmp_path, recipe, CASES[case])


@pytest.mark.parametrize("recipe", ["full", SCORED_UNIFORM], ids=["unscored", "scored"])
@pytest.mark.parametrize("steps_per_generation", [2, 4])
def test_uniform_weights_are_plain_grpo_with_a_reference_model(
    tmp_path, steps_per_generation, recipe
):
    tiny.policy().save_pretrained(tmp_path / "model")
    changes = {
        "model": str(tmp_path / "model"),
        "beta": 0.1,
        "steps_per_generation": steps_per_generation,
    }
    same_training(tmp_path, recipe, changes)
