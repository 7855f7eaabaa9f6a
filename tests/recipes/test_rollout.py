"""The shared part of the adapters: weights, scale and metrics of a rollout batch."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

import tokenweights as tw
from tokenweights import TokenWeightsError

RECIPES = ["full", "low2high", "anchor20", "random20", "position_matched20"]


def batch():
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(12) < torch.tensor([12, 7, 1, 0])[:, None]
    scores = torch.rand(4, 12, generator=generator)
    return scores.masked_fill(~mask, torch.nan), mask


def rollout(name, rows=slice(None), group=None):
    scores, mask = batch()
    made = tw.recipe(name)
    return tw.weighted_rollout(
        made,
        None if made.signal == "none" else scores[rows],
        mask[rows],
        step=30,
        sample_ids=torch.arange(4)[rows],
        group=group,
    )


@pytest.mark.parametrize("name", RECIPES)
def test_it_holds_what_the_recipe_says(name):
    scores, mask = batch()
    made, whole = tw.recipe(name), rollout(name)
    scores = None if made.signal == "none" else scores
    weights = made.token_weights(scores, mask, step=30, sample_ids=torch.arange(4))
    assert torch.equal(whole.weights, weights)
    assert torch.equal(whole.scale, made.denominator_scale(weights, mask))
    assert whole.metrics["weight_mean"] == pytest.approx(float(weights[mask].mean()))
    assert ("endpoint_low" in whole.metrics) == (made.rule == "endpoints")


def test_a_batch_without_tokens_has_no_metrics():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    made = tw.weighted_rollout(tw.recipe("low2high"), torch.zeros(2, 3), nothing, step=0)
    assert made.metrics == {} and not made.weights.any()


def test_missing_scores_are_refused():
    with pytest.raises(TokenWeightsError, match="scores"):
        tw.weighted_rollout(tw.recipe("low2high"), None, batch()[1], step=0)


def test_the_recipe_of_a_trainer_comes_as_name_fields_or_text():
    made = tw.recipe({"name": "anchor20", "fraction": 0.4})
    for choice in (made, made.to_dict(), '{"name": "anchor20", "fraction": 0.4}'):
        assert tw.rollout_recipe(choice, caller="train") == made
    for choice, message in (
        (None, "a recipe name or a dict"),
        ("", "a recipe name or a dict"),
        ("{name: anchor20}", "valid JSON"),
        ("anchro20", "Did you mean 'anchor20'"),
        ("loss_low20", "other than loss_magnitude"),
        (tw.recipe("loss_high20"), "other than loss_magnitude"),
    ):
        with pytest.raises(TokenWeightsError, match=message):
            tw.rollout_recipe(choice, caller="train")


def rows_of_a_rank(rank, size):
    rows = slice(rank * 2, rank * 2 + 2)
    return [rollout(name, rows, dist.group.WORLD) for name in RECIPES]


def test_ranks_equal_the_whole():
    for name, *parts in zip(RECIPES, *on_ranks(rows_of_a_rank, 2), strict=True):
        whole = rollout(name)
        torch.testing.assert_close(torch.cat([part.weights for part in parts]), whole.weights)
        for part in parts:
            torch.testing.assert_close(part.scale, whole.scale)
            assert part.metrics == pytest.approx(whole.metrics)
