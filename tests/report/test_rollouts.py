"""Which responses of a rollout batch become token records, and what is added to them."""

from dataclasses import replace

import pytest
import torch

import tokenweights as tw
from tokenweights.report import read_token_records
from tokenweights.report.rollouts import RolloutRecords, first_prompt_rows

RECIPE = tw.recipe({"name": "low2high", "layers": [2]})


def batch(rewards=None):
    mask = torch.ones(6, 3, dtype=torch.bool)
    mask[0] = False  # a response without a token
    scores = torch.rand(6, 3)
    return tw.RolloutBatch(
        mask=mask,
        sample_ids=torch.arange(6),
        prompt_ids=torch.tensor([7, 7, 3, 3, 9, 9]),
        token_ids=torch.ones(6, 3, dtype=torch.int64),
        advantages=torch.ones(6, 1),
        attention={2: scores},
        rewards=rewards,
    )


def appended(path, given, **options):
    records = RolloutRecords(str(path), every=1, **options)
    records.append(
        RECIPE,
        given,
        RECIPE.weighted(given, step=0),
        step=0,
        prompt=lambda row: f"prompt {row // 2}",
        decode=str,
    )
    return list(read_token_records(path))


@pytest.mark.parametrize(("prompts", "rows"), [(1, [1]), (2, [1, 2, 3]), (9, [1, 2, 3, 4, 5])])
def test_the_first_prompts_are_recorded(tmp_path, prompts, rows):
    assert first_prompt_rows(batch(), prompts=prompts) == rows
    found = appended(tmp_path / "tokens.jsonl", batch(), prompts=prompts)
    assert [record.sample_id for record in found] == rows
    assert {record.reward for record in found} == {None}


def test_records_need_to_know_which_prompt_a_row_answers(tmp_path):
    given = replace(batch(), prompt_ids=None)
    with pytest.raises(tw.TokenWeightsError, match="`first_prompt_rows`: expected `prompt_ids`"):
        appended(tmp_path / "tokens.jsonl", given)


def test_rewards_are_those_of_the_rows(tmp_path):
    rewards = torch.tensor([9.0, 1.0, -1.0, -2.0, 0.5, 0.25])
    found = appended(tmp_path / "tokens.jsonl", batch(rewards), prompts=2)
    assert [record.reward for record in found] == [1.0, -1.0, -2.0]


def test_a_record_can_be_enriched(tmp_path):
    columns = {"mean_distance": (1.0, 2.0, 3.0)}
    found = appended(
        tmp_path / "tokens.jsonl", batch(), enriched=lambda record: replace(record, columns=columns)
    )
    assert [record.columns for record in found] == [columns]
