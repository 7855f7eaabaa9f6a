"""The rollout batch: shapes, defaults, and parts of it."""

import pytest
import torch

from tokenweights import RolloutBatch, TokenWeightsError

MASK = torch.tensor([[True, False], [True, True], [False, False]])


def test_numbers_default_to_rows_and_prompts_to_samples():
    batch = RolloutBatch(mask=MASK)
    assert batch.sample_ids.tolist() == batch.prompt_ids.tolist() == [0, 1, 2]
    assert RolloutBatch(mask=MASK, sample_ids=torch.tensor([5, 6, 7])).prompt_ids.tolist() == [
        5,
        6,
        7,
    ]


def test_columns_are_detached_and_masks_of_integers_taken():
    batch = RolloutBatch(mask=MASK.long(), log_probs=torch.zeros(3, 2, requires_grad=True))
    assert batch.mask.dtype == torch.bool and not batch.log_probs.requires_grad


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"log_probs": torch.zeros(3, 3)}, "`RolloutBatch`: expected `log_probs`"),
        ({"advantages": torch.zeros(3)}, "expected `advantages`"),
        ({"rewards": torch.zeros(3, 1)}, "expected `rewards`"),
        ({"attention": {1: torch.zeros(2, 2)}}, "expected `attention`"),
        ({"token_ids": torch.zeros(3, 2)}, "expected `token_ids`"),
    ],
)
def test_a_wrong_shape_is_refused_by_name(columns, words):
    with pytest.raises(TokenWeightsError) as error:
        RolloutBatch(mask=MASK, **columns)
    assert words in str(error.value)


def test_rows_are_a_batch():
    batch = RolloutBatch(
        mask=MASK,
        prompt_ids=torch.tensor([1, 1, 2]),
        advantages=torch.tensor([[1.0], [2.0], [3.0]]),
        attention={4: torch.arange(6.0).view(3, 2)},
    )
    part = batch.rows([2, 0])
    assert part.sample_ids.tolist() == [2, 0] and part.prompt_ids.tolist() == [2, 1]
    assert part.advantages.tolist() == [[3.0], [1.0]]
    assert part.attention[4].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert batch.rows([]).mask.shape == (0, 2)


def test_what_is_missing_is_named():
    batch = RolloutBatch(mask=MASK, rewards=torch.zeros(3))
    batch.require(["rewards", "mask"], caller="rule")
    with pytest.raises(TokenWeightsError, match=r"`rule`: expected `advantages` given"):
        batch.require(["advantages"], caller="rule")
