"""The paper's rules: their schedules, subsets and controls."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import tokenweights as tw
from tokenweights import RolloutBatch, TokenWeightsError
from tokenweights.recipes import rules


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("linear", {0: (1, 0), 5: (0.5, 0.5), 10: (0, 1), 99: (0, 1)}),
        ("cosine", {0: (1, 0), 5: (0.5, 0.5), 10: (0, 1)}),
        ("step", {0: (1, 0), 9: (1, 0), 10: (0, 1)}),
        ("constant", {0: (1, 0), 99: (1, 0)}),
    ],
)
def test_endpoints_follow_the_schedule(schedule, at):
    rule = rules.EndpointWeights(schedule=schedule, warmup_steps=10)
    for step, (low, high) in at.items():
        ends = rule.endpoints(step)
        assert (ends.low, ends.high) == (pytest.approx(low), pytest.approx(high))


def test_matched_rules_imitate_the_side_and_the_positions_they_name():
    batch = RolloutBatch(mask=torch.ones(1, 40, dtype=torch.bool))
    scores = torch.linspace(0, 1, 40)[None]  # the bottom is the front, the top is the back
    for side, place in (("bottom", slice(0, 8)), ("top", slice(32, 40))):
        chosen = rules.PositionMatched(matched_to=side, position_bins=5)(scores, batch, step=0)
        assert chosen.sum() == 8 and chosen[0, place].sum() == 8
    chosen = rules.PositionMatched(position_bins=2, seed=1)(scores, batch, step=0)
    assert chosen[0, :20].sum() == 8 and chosen[0, :8].sum() < 8


def test_a_rule_of_a_scope_takes_its_own_weights():
    batch = RolloutBatch(
        mask=torch.tensor([[True, True], [True, False]]),
        prompt_ids=torch.tensor([3, 3]),
        advantages=torch.tensor([[1.0], [-1.0]]),
    )
    scores = torch.tensor([[0.1, 0.9], [0.5, 7.0]])
    rule = rules.Top(fraction=0.4, scope="batch", inside=3.0, outside=0.5)
    assert rule(scores, batch, step=0).tolist() == [[0.5, 3.0], [3.0, 0.0]]
    rule = dataclasses.replace(rule, sign="positive")
    assert rule.columns == ("advantages",)
    assert rule(scores, batch, step=0).tolist() == [[0.5, 3.0], [0.5, 0.0]]


@pytest.mark.parametrize("made", rules.ALL, ids=lambda made: made.kind)
def test_scored_rules_refuse_to_run_without_scores(made):
    batch = RolloutBatch(mask=torch.ones(1, 5, dtype=torch.bool))
    if made.scored:
        with pytest.raises(TokenWeightsError, match=f"`{made.kind}`: expected `scores` given"):
            made()(None, batch, step=0)
    else:
        assert made()(None, batch, step=0).shape == (1, 5)


# What the paper's recipes gave on one small batch when a recipe was one flat record; never written
# again. Which exponential a processor takes may move a soft weight by its last bits.
RECORDED = json.loads(Path(__file__).with_name("recorded.json").read_text())
SOFT = [n for n in tw.recipe_names() if isinstance(tw.recipe(n).rule, rules.EndpointWeights)]


@pytest.mark.parametrize("case", RECORDED)
def test_the_papers_recipes_give_what_they_always_gave(case):
    name, step = case.split()
    mask = torch.tensor([[1] * 12, [1] * 7 + [0] * 5, [0] + [1] * 9 + [0] * 2, [0] * 12]).bool()
    place = torch.arange(48).view(4, 12)
    scores = ((place * 37) % 101).float() / 128
    scores[1, 2] = scores[1, 5]
    log_probs, old = -((place * 29) % 53).float() / 64, -((place * 31) % 47).float() / 64
    advantages = torch.tensor([[1.0], [-0.5], [0.75], [2.0]])
    batch = RolloutBatch(
        mask=mask,
        sample_ids=torch.tensor([11, -3, 2**40, 7]),
        token_ids=place % 5,
        attention={2: scores},
        predictive_entropy=scores,
        token_loss=scores,
    )
    made = tw.recipe(name)
    if made.attention:
        made = tw.recipe(made.to_dict() | {"layers": 2})
    rollout = made.weighted(batch, step=int(step))
    factors = advantages * rollout.weights * rollout.scale
    losses = tw.clipped_surrogate_loss(log_probs, old, factors, mask=mask)
    expected = RECORDED[case]
    near = {"rtol": 0, "atol": 3e-7 if name in SOFT else 0}
    torch.testing.assert_close(rollout.weights, torch.tensor(expected["weights"]), **near)
    assert float(rollout.scale) == pytest.approx(expected["scale"], rel=1e-7)
    loss = float(tw.weighted_token_mean(losses, mask))
    assert loss == pytest.approx(expected["loss"], rel=1e-6, abs=1e-7)
