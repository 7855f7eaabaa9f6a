import dataclasses
import json
import math

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from strategies import scored_masks

import tokenweights as tw
from tokenweights import Endpoints, Recipe, TokenWeightsError

NAMES = tw.recipe_names()


@st.composite
def changed_recipes(draw):
    base = tw.recipe(draw(st.sampled_from(NAMES)))
    return dataclasses.replace(
        base,
        warmup_steps=draw(st.integers(0, 500)),
        temperature=draw(st.floats(1e-4, 1e4)),
        layers=draw(st.none() | st.lists(st.integers(-4, 30), min_size=1).map(tuple)),
        schedule=draw(st.sampled_from(["constant", "linear", "cosine", "step"])),
        match_mass=draw(st.booleans()),
    )


@given(changed_recipes())
def test_recipes_round_trip_through_dict_json_and_yaml(made):
    values = made.to_dict()
    assert Recipe.from_dict(values) == made
    assert Recipe.from_dict(json.loads(json.dumps(values))) == made
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(values))) == made


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rule": "endpoints", "temprature": 1.0}, "'temprature'. Did you mean 'temperature'"),
        ({"rule": "bottm"}, "Did you mean 'bottom'"),
        ({"rule": "endpoints", "schedule": "linaer"}, "Did you mean 'linear'"),
        ({"rule": "endpoints", "temperature": -1.0}, "`temperature` positive"),
        ({"rule": "endpoints", "temperature": "hot"}, "`temperature` of type float"),
        ({"rule": "endpoints", "warmup_steps": 0.5}, "`warmup_steps` of type int"),
        ({"rule": "endpoints", "warmup_steps": -1}, "`warmup_steps` >= 0"),
        ({"rule": "endpoints", "low": [1.0]}, "`low`"),
        ({"rule": "endpoints", "high": [0.0, -1.0]}, "`high`"),
        ({"rule": "endpoints", "low": [1e31, 0.0]}, "`low`"),
        ({"rule": "position_matched", "position_bins": 10**7}, "`position_bins`"),
        ({"rule": "endpoints", "layers": []}, "`layers` not empty"),
        ({"rule": "endpoints", "layers": ["last"]}, "`layers`"),
        ({"rule": "endpoints", "form": "literal", "eps": 0.0}, "`eps` positive"),
        ({"rule": "bottom", "fraction": 2.0}, "`fraction`"),
        ({"rule": "bottom", "signal": "none"}, "`signal` other than 'none'"),
        ({"rule": "uniform"}, "`signal` equal to 'none'"),
        ({"name": "low2high"}, "Pass the mapping to `recipe`"),
    ],
)
def test_nonsense_is_refused_with_what_to_do(fields, words):
    with pytest.raises(TokenWeightsError, match="expected") as error:
        Recipe.from_dict(fields)
    assert words in str(error.value)


def test_probe_layers():
    made = tw.recipe("low2high")
    assert made.probe_layers(36) == (20,)
    assert dataclasses.replace(made, layers=(0, -1)).probe_layers(4) == (0, 3)
    assert dataclasses.replace(made, layers=(3, 0, -1)).probe_layers(4) == (3, 0)
    assert tw.recipe("front20").probe_layers(4) == ()
    assert tw.recipe("predictive_low20").probe_layers(4) == ()
    with pytest.raises(TokenWeightsError, match=r"\[0, 1, 2, 3\], got 4"):
        dataclasses.replace(made, layers=(4,)).probe_layers(4)


def test_probe_layers_of_a_hybrid_model():
    made = tw.recipe("low2high")
    assert made.probe_layers(12, available=(2, 5, 8, 11)) == (5,)
    assert made.probe_layers(12, available=()) == ()
    last = dataclasses.replace(made, layers=(-1, 2))
    assert last.probe_layers(12, available=(2, 5, 8)) == (8, 2)
    with pytest.raises(TokenWeightsError, match=r"\[2, 5\], got 3"):
        dataclasses.replace(made, layers=(3,)).probe_layers(12, available=(2, 5))


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
    made = tw.recipe({"name": "low2high", "schedule": schedule, "warmup_steps": 10})
    for step, (low, high) in at.items():
        ends = made.endpoints(step)
        assert (ends.low, ends.high) == (pytest.approx(low), pytest.approx(high))


def test_endpoints_of_uniform_and_hard_rules():
    assert tw.recipe("full").endpoints(3) == Endpoints(1.0, 1.0)
    with pytest.raises(TokenWeightsError, match="rule"):
        tw.recipe("anchor20").endpoints(3)


@given(scored_masks(), st.sampled_from(NAMES), st.integers(0, 200))
def test_every_recipe_gives_weights_and_a_denominator(case, name, step):
    scores, mask = case
    made = tw.recipe(name)
    types = torch.arange(mask.numel()).view(mask.shape) % 3
    given_scores = None if made.signal == "none" else scores.float()
    weights = made.token_weights(given_scores, mask, step=step, token_groups=types)
    assert (weights >= 0).all() and (weights[~mask] == 0).all() and torch.isfinite(weights).all()
    scale = made.denominator_scale(weights, mask)
    token_loss = torch.where(mask, scores * 2 - 1, torch.nan).float()
    scaled = tw.weighted_token_mean(token_loss, mask, weights * scale)
    meant = tw.weighted_token_mean(token_loss, mask, weights, denominator=made.denominator)
    torch.testing.assert_close(scaled, meant)


def test_match_mass_keeps_the_mean_weight_at_one():
    made = tw.recipe({"name": "low2high", "match_mass": True})
    mask = torch.ones(2, 50, dtype=torch.bool)
    for step in (0, 30, 100):
        assert made.token_weights(torch.rand(2, 50), mask, step=step).mean() == pytest.approx(1)


def test_layers_merge_by_mean_or_by_rank():
    mask = torch.tensor([[True, True, True, False]])
    one = torch.tensor([[0.1, 0.2, 0.9, math.nan]])
    other = torch.tensor([[0.5, 0.3, 0.7, math.nan]])
    mean = tw.recipe("low2high").merged_layers([one, other], mask)
    torch.testing.assert_close(mean[0, :3], torch.tensor([0.3, 0.25, 0.8]))
    ranks = tw.recipe({"name": "low2high", "layer_reduction": "rank_mean"})
    assert ranks.merged_layers([one, other], mask)[0, :3].tolist() == [0.25, 0.25, 1.0]


def test_alignment_picks_the_row():
    scores = torch.tensor([[1.0, 2.0, 3.0]])
    assert tw.recipe("low2high").aligned(scores, response_length=2).tolist() == [[1.0, 2.0]]
    own = tw.recipe({"name": "low2high", "alignment": "own"})
    assert own.aligned(scores, response_length=2).tolist() == [[2.0, 3.0]]


def test_matched_rules_imitate_the_side_and_the_positions_they_name():
    mask = torch.ones(1, 40, dtype=torch.bool)
    scores = torch.linspace(0, 1, 40)[None]  # the bottom is the front, the top is the back
    for side, place in (("bottom", slice(0, 8)), ("top", slice(32, 40))):
        made = tw.recipe({"name": "position_matched20", "matched_to": side, "position_bins": 5})
        chosen = made.token_weights(scores, mask, step=0)
        assert chosen.sum() == 8 and chosen[0, place].sum() == 8
    wide = tw.recipe({"name": "position_matched20", "position_bins": 2, "seed": 1})
    chosen = wide.token_weights(scores, mask, step=0)
    assert chosen[0, :20].sum() == 8 and chosen[0, :8].sum() < 8


@pytest.mark.parametrize("name", NAMES)
def test_a_negative_step_is_refused_by_every_rule(name):
    made, ones = tw.recipe(name), torch.ones(1, 3)
    scores = None if made.signal == "none" else ones
    with pytest.raises(TokenWeightsError, match="`step`"):
        made.token_weights(scores, ones.bool(), step=-1, token_groups=ones.long())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_of_half_precision_are_merged_in_float32(dtype):
    layers, mask = torch.rand(3, 1, 50).to(dtype), torch.ones(1, 50, dtype=torch.bool)
    for chosen in (layers, layers[:1]):
        merged = tw.recipe("low2high").merged_layers(list(chosen), mask)
        torch.testing.assert_close(merged, chosen.float().mean(0))


def test_missing_inputs_are_refused():
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(TokenWeightsError, match="scores"):
        tw.recipe("low2high").token_weights(None, mask, step=0)
    with pytest.raises(TokenWeightsError, match="token_groups"):
        tw.recipe("type_matched20").token_weights(torch.rand(1, 2), mask, step=0)
    with pytest.raises(TokenWeightsError, match="scores"):
        tw.recipe("low2high").merged_layers([], mask)
    with pytest.raises(TokenWeightsError, match="finite"):
        tw.recipe("low2high").token_weights(torch.full((1, 2), math.nan), mask, step=0)
