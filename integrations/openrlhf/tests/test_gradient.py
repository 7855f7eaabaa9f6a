"""The weighted gradient equals one that is written down again, on every layout."""

import pytest
import reference
import tiny
from layouts import LAYOUTS

STEP = 3
LOW2HIGH = {"name": "low2high", "warmup_steps": 8, "temperature": 0.5}
ANCHOR20 = {"name": "anchor20", "denominator": "selected_tokens"}


def weights_by_hand(recipe, found):
    if recipe["name"] == "low2high":
        share = STEP / 8
        return reference.soft_weights(
            [signals["attention"] for signals in found], low=1 - share, high=share, temperature=0.5
        )
    signal = "predictive" if recipe["name"] == "predictive_low20" else "attention"
    return reference.lowest_fifth([signals[signal] for signals in found])


def check(actors, policy, recipe, *options, temperature=1.0, **settings):
    arguments = tiny.arguments(policy, *options, recipe=recipe, **settings)
    (status,), after = tiny.trained(actors, arguments, first_step=STEP)
    responses = list(tiny.responses())
    row = recipe.get("alignment", "deciding")
    model, found = reference.read(policy, responses, row=row, temperature=temperature)
    weights = weights_by_hand(recipe, found)
    gradient, norm = reference.gradient(
        model, found, responses, weights, denominator=recipe.get("denominator", "all_tokens")
    )
    assert status["actor_grad_norm"] == pytest.approx(norm, rel=1e-5)
    taken = reference.steps_taken(reference.load(policy).state_dict(), after)
    assert reference.largest_difference(taken, gradient) < 2e-5
    mean = sum(map(sum, weights)) / sum(map(len, weights))
    assert status["token_weights/weight_mean"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(("options", "settings"), LAYOUTS)
@pytest.mark.parametrize("recipe", [LOW2HIGH, ANCHOR20], ids=["low2high", "anchor20"])
def test_every_layout_has_the_weighted_gradient(actors, policy, recipe, options, settings):
    check(actors, policy, recipe, *options, **settings)


@pytest.mark.parametrize(
    "recipe",
    [
        {**LOW2HIGH, "alignment": "own"},
        {**LOW2HIGH, "denominator": "weight_sum"},
        {**ANCHOR20, "denominator": "all_tokens"},
        {"name": "predictive_low20", "denominator": "selected_tokens"},
    ],
    ids=["own row", "weight sum", "all tokens", "predictive"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_other_rows_denominators_and_signals(actors, policy, recipe, packed):
    check(actors, policy, recipe, packed=packed)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_rollout_temperature_scales_predictive_entropies(actors, policy, packed):
    recipe = {"name": "predictive_low20", "denominator": "selected_tokens"}
    options = ("--rollout.temperature", 1.7)
    check(actors, policy, recipe, *options, temperature=1.7, packed=packed)


def test_gradient_checkpointing_changes_nothing(actors, policy):
    options = ("--actor.gradient_checkpointing_enable", "--ds.zero_stage", 3)
    check(actors, policy, LOW2HIGH, *options, ranks=2, packed=True)


def test_the_clipped_and_the_dual_clipped_loss_of_weighted_advantages_is_the_weighted_loss():
    import torch
    from openrlhf.models import PolicyLoss

    draw = torch.Generator().manual_seed(0)
    new, old, rollout, advantages = torch.randn(4, 6, 9, generator=draw)
    weights = torch.rand(6, 9, generator=draw) * (torch.rand(6, 9, generator=draw) > 0.3)
    corrections = [
        {},
        {"is_correction_level": "token", "is_correction_mode": "clip"},
        {"is_correction_level": "token", "is_correction_mode": "mask"},
        {"is_correction_level": "seq", "is_correction_mode": "mask"},
    ]
    for dual_clip in (None, 1.5):
        for correction in corrections:
            threshold = {"is_correction_threshold": [0.5, 5.0]} if correction else {}
            loss = PolicyLoss(0.2, 0.28, dual_clip, **correction, **threshold)

            def token_loss(scaled, loss=loss, token=None):
                """Of one token at a time: the mean over a mask with a single one."""
                rows = []
                for row in range(6):
                    for column in range(9):
                        mask = torch.zeros(6, 9)
                        mask[row, column] = 1
                        rows.append(
                            loss(new, old, scaled, action_mask=mask, rollout_log_probs=rollout)[0]
                        )
                return torch.stack(rows).view(6, 9)

            torch.testing.assert_close(
                token_loss(advantages * weights), token_loss(advantages) * weights
            )
