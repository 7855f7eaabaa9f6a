"""The schedule's step, by hand."""

import pytest
from configured import composed

from tokenweights_verl.trainer import TokenWeightsTrainerSync

pytestmark = pytest.mark.versions


@pytest.fixture(scope="module")
def trainer():
    made = TokenWeightsTrainerSync.__new__(TokenWeightsTrainerSync)
    made.config = composed()
    return made


@pytest.mark.parametrize(
    ("critic_warmup", "steps"),
    [
        (0, [0, 1, 2, 3, 4, 5]),
        (1, [0, 1, 2, 3, 4, 5]),
        (2, [0, 0, 1, 2, 3, 4]),
        (4, [0, 0, 0, 0, 1, 2]),
        (9, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_the_schedule_begins_with_the_policys_first_update(trainer, critic_warmup, steps):
    """VeRL counts from 1 and updates the policy from step `critic_warmup` on."""
    trainer.config.trainer.critic_warmup = critic_warmup
    for trainer.global_steps, step in enumerate(steps, 1):
        assert trainer.schedule_step == step
