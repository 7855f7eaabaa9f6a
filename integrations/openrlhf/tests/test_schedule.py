"""The schedule's step, by hand and in OpenRLHF's own loop."""

import pytest
import tiny
from test_scores import maker

from tokenweights_openrlhf import TokenWeightsExperienceMaker


@pytest.mark.parametrize(
    ("freezing_steps", "steps"),
    [
        (-1, [0, 1, 2, 3, 4, 5]),
        (0, [0, 0, 1, 2, 3, 4]),
        (1, [0, 0, 0, 1, 2, 3]),
        (3, [0, 0, 0, 0, 0, 1]),
        (9, [0, 0, 0, 0, 0, 0]),
        (-5, [0, 1, 2, 3, 4, 5]),
    ],
)
@pytest.mark.versions
def test_the_schedule_begins_with_the_policys_first_update(policy, freezing_steps, steps):
    """OpenRLHF counts from 0 and updates the policy after step `freezing_steps`."""
    options = ("--critic.freezing_steps", freezing_steps)
    made = maker(TokenWeightsExperienceMaker, tiny.arguments(policy, *options, recipe="front20"))
    for made.global_step, step in enumerate(steps):
        assert made.schedule_step == step


def test_rollouts_of_a_frozen_policy_have_the_weights_of_step_0_and_are_trained_together(
    actors, policy
):
    options = ("--critic.freezing_steps", 1, "--actor.adam.lr", "1e5")
    recipe = {"name": "low2high", "warmup_steps": 4}
    statuses, _ = tiny.trained(actors, tiny.arguments(policy, *options, recipe=recipe), steps=4)
    assert ["policy_loss" in status for status in statuses] == [False, False, True, True]
    assert [status["token_weights/endpoint_high"] for status in statuses] == [0, 0, 0, 0.25]
    rewards = [[row["reward"] for row in tiny.responses(seed)] for seed in range(4)]
    means = [sum(one) / len(one) for one in rewards]
    assert statuses[2]["reward"] == pytest.approx(sum(means[:3]) / 3)
    assert statuses[3]["reward"] == pytest.approx(means[3])
