"""The recipe: what fits together, what a batch becomes, and what of a user's parts is refused."""

import dataclasses
import json
import math
import pickle
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from strategies import scored_masks

import tokenweights as tw
from tokenweights import Recipe, RolloutBatch, TokenWeightsError
from tokenweights.losses import Denominator
from tokenweights.recipes import combine, field, rules, signals
from tokenweights.recipes.parts import columns_of

NAMES = tw.recipe_names()
# Recipes that need scores and no more than a batch has beside them.
SCORED_ONLY = [name for name in NAMES if not set(tw.recipe(name).columns) - {"attention"}]


@st.composite
def changed_recipes(draw):
    base = tw.recipe(draw(st.sampled_from(["low2high", "high2low", "static_anchor"])))
    return tw.recipe(
        base.to_dict()
        | {
            "warmup_steps": draw(st.integers(0, 500)),
            "temperature": draw(st.floats(1e-4, 1e4)),
            "layers": draw(st.none() | st.lists(st.integers(-4, 30), min_size=1)),
            "schedule": draw(st.sampled_from(["constant", "linear", "cosine", "step"])),
            "match_mass": draw(st.booleans()),
        }
    )


@given(changed_recipes() | st.sampled_from(NAMES).map(tw.recipe))
def test_recipes_round_trip_through_dict_json_yaml_and_pickle(made):
    values = made.to_dict()
    assert Recipe.from_dict(values) == made == tw.recipe(values)
    assert Recipe.from_dict(json.loads(json.dumps(values))) == made
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(values))) == made
    assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rule": "endpoints", "temprature": 1.0}, "'temprature'. Did you mean 'temperature'"),
        ({"rule": "bottm"}, "Did you mean 'bottom'"),
        ({"rule": {"kind": "bottm"}}, "Did you mean 'bottom'"),
        ({"rule": {"fraction": 0.2}}, "a mapping with a kind"),
        ({"rule": {"kind": "top", "fracton": 0.2}}, "Did you mean 'fraction'"),
        ({"rule": {"kind": "surprisal"}}, "`rule` known, got 'surprisal'"),
        ({"rule": "top", "signal": "predictiv_entropy"}, "Did you mean 'predictive_entropy'"),
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
        ({"rule": "uniform", "fraction": 0.2}, "'fraction'"),
        ({"rule": "bottom", "signal": "none"}, "expected `signal` given with the rule 'bottom'"),
        ({"rule": "uniform", "signal": "position"}, "`signal` None with the rule 'uniform'"),
        ({"rule": "top", "denominator": "tokens"}, "Did you mean 'all_tokens'"),
        ({"rule": "top", "match_mass": "yes"}, "`match_mass` of type bool"),
        (
            {"rule": "top", "match_mass": True, "denominator": "selected_tokens"},
            "`match_mass` False with the denominator 'selected_tokens'",
        ),
        ({"rule": "top", "name": 3}, "`name` of type str"),
        ({"name": "low2high"}, "Pass the mapping to `recipe`"),
        ({"rule": "no.such.module:Rule"}, "a module that can be imported"),
        ({"rule": "tokenweights.recipes.rules:Topp"}, "Did you mean 'Top'"),
        ({"rule": "tokenweights.recipes.rules:MIN_WEIGHT"}, "a signal or a rule"),
    ],
)
def test_nonsense_is_refused_with_what_to_do(fields, words):
    with pytest.raises(TokenWeightsError, match="expected") as error:
        Recipe.from_dict(fields)
    assert words in str(error.value)


def test_a_key_of_two_parts_is_refused_and_reaches_either_as_a_mapping():
    top = {"kind": "top", "fraction": 0.1}
    rule = {"kind": "by_sign", "positive": top, "negative": top | {"fraction": 0.3}}
    with pytest.raises(TokenWeightsError, match="of exactly one part"):
        tw.recipe({"rule": rule, "signal": "position", "fraction": 0.5})
    made = tw.recipe({"rule": rule, "signal": "position"})
    assert (made.rule.positive.fraction, made.rule.negative.fraction) == (0.1, 0.3)


def test_a_word_or_a_mapping_of_the_same_kind_changes_a_named_part():
    made = tw.recipe({"name": "high2low", "rule": {"kind": "endpoints", "warmup_steps": 7}})
    assert made.rule.warmup_steps == 7 and made.rule.endpoints(0) == tw.Endpoints(0.0, 1.0)


OLD = {
    "name": "low2high", "signal": "attention_entropy", "rule": "endpoints", "fraction": 0.2,
    "matched_to": "bottom", "position_bins": 10, "low": [1.0, 0.0], "high": [0.0, 1.0],
    "schedule": "linear", "warmup_steps": 50, "temperature": 1.0, "form": "stable", "eps": 1e-8,
    "layers": [3], "layer_reduction": "mean", "entropy_kind": "normalized", "top_k": 256,
    "fixed_k": 256, "alignment": "deciding", "denominator": "all_tokens", "match_mass": False,
    "seed": 0,
}  # fmt: skip


def test_a_flat_record_that_was_saved_is_read():
    made = tw.recipe(OLD)
    assert made == tw.recipe({"name": "low2high", "warmup_steps": 50, "layers": 3})
    with pytest.raises(TokenWeightsError, match="'fraction'"):
        tw.recipe(OLD | {"fraction": 0.3})  # which the rule never had a use for


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("fraction", "recipe.rule.fraction"),
        ("layers", "recipe.signal.layers"),
        ("endpoints", "recipe.rule.endpoints"),
        ("probe_layers", "recipe.placed(depth).layers"),
        ("captured_entropy", "recipe.attention.captured"),
    ],
)
def test_names_that_moved_say_where_to(name, new):
    if name != "layers":  # a property now: those that are read
        with pytest.raises(AttributeError, match="is now") as error:
            getattr(tw.recipe("anchor20"), name)
        assert new in str(error.value)
    if name in ("fraction", "layers"):
        with pytest.raises(TokenWeightsError, match="is now") as error:
            Recipe(rule=rules.Top(), **{name: 0.3})
        assert new in str(error.value)


def test_parts_are_objects_not_words():
    with pytest.raises(TokenWeightsError, match="a part, not its name"):
        Recipe(rule="top", signal="predictive_entropy")
    with pytest.raises(TokenWeightsError, match="`rule` callable"):
        Recipe(rule=3)
    with pytest.raises(TokenWeightsError, match="`rule` callable"):
        Recipe(rule=rules.Top, signal=signals.Surprisal())


def test_layers_are_numbered_for_a_model():
    made = tw.recipe("low2high")
    assert made.layers == () and made.placed(36).layers == (20,)
    assert tw.recipe({"name": "low2high", "layers": [3, 0, -1]}).placed(4).layers == (3, 0)
    for name in ("front20", "predictive_low20"):
        assert tw.recipe(name).placed(4).layers == () and tw.recipe(name).attention is None
    one, other = signals.AttentionEntropy(layers=(1,)), signals.AttentionEntropy(layers=(-1, 1))
    both = Recipe(signal=combine.MeanOf(signals=(one, other)), rule=rules.Top())
    assert both.placed(6).layers == (1, 5)


def test_one_recipe_reads_one_statistic_of_attention():
    one, other = signals.AttentionEntropy(), signals.AttentionEntropy(entropy_kind="raw")
    with pytest.raises(TokenWeightsError, match="one statistic of attention"):
        Recipe(signal=combine.MeanOf(signals=(one, other)), rule=rules.Top())


def batch(**columns):
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    return RolloutBatch(mask=mask, **columns)


def test_a_missing_column_is_named_with_who_reads_it():
    made = tw.recipe("surprisal_boost10")
    assert made.columns == ("log_probs", "advantages", "predictive_entropy")
    with pytest.raises(TokenWeightsError, match=r"`surprisal`: expected `log_probs` given"):
        made.weighted(batch(), step=0)
    with pytest.raises(TokenWeightsError, match=r"expected `advantages` given"):
        made.weighted(batch(log_probs=torch.zeros(2, 4)), step=0)


@dataclass(frozen=True)
class Confident:
    """Probability above a bound."""

    bound: float = 0.5
    columns = ("log_probs",)

    def __call__(self, batch):
        return (batch.log_probs.exp() - self.bound).clamp(min=0)


@dataclass(frozen=True)
class Softened:
    """The score to a power."""

    power: float = 1.0

    def __call__(self, scores, batch, *, step, group=None):
        return scores.clamp(min=0) ** self.power


def test_parts_of_a_users_run_describe_themselves_and_travel_as_text():
    made = Recipe(name="mine", signal=Confident(0.25), rule=Softened(2.0))
    given = batch(log_probs=torch.zeros(2, 4))
    assert made.columns == ("log_probs",)
    weights = made.weighted(given, step=0).weights
    assert torch.equal(weights, torch.where(given.mask, 0.5625, 0.0))
    assert "Probability above a bound." in made.describe()
    text = json.dumps(made.to_dict())
    assert "test_recipe:Confident" in text and tw.recipe(json.loads(text)) == made
    changed = tw.recipe(json.loads(text) | {"power": 1.0})
    assert changed.rule == Softened(1.0)


def power_of_two(scores, batch, *, step, group=None):
    """Two to the score."""
    return torch.where(batch.mask, 2.0**scores, 0.0)


@dataclass(frozen=True)
class Longer:
    """A rule that says that it needs no scores."""

    scored = False

    def __call__(self, scores, batch, *, step, group=None):
        assert scores is None
        return batch.mask.float()


@dataclass(frozen=True)
class Rescaled(Softened):
    """A rule that says that it needs them."""

    scored = True


def test_a_rule_needs_scores_unless_it_says_otherwise():
    """Everywhere alike: beside a named recipe's signal, in a mapping, composed, and inside."""
    here = f"{__name__}:"
    silent = ("power_of_two", "Softened", "Rescaled")
    for name in ("predictive_high20", "anchor20", "surprisal_boost10", "random20", "full"):
        base = tw.recipe(name)
        for rule in silent:
            changed = tw.recipe({"name": name, "rule": here + rule})
            assert changed.signal == (base.signal or signals.AttentionEntropy())
        assert tw.recipe({"name": name, "rule": here + "Longer"}).signal is None
    for rule in silent:
        assert tw.recipe({"rule": here + rule}).signal == signals.AttentionEntropy()
    assert tw.recipe({"rule": here + "Longer"}).signal is None
    position = signals.Position()
    for rule in (power_of_two, Softened(), Rescaled()):
        both = combine.BySign(positive=rule, negative=Longer())
        assert both.scored and Recipe(rule=both, signal=position).signal == position
        for whole in (rule, both):
            with pytest.raises(TokenWeightsError, match=r"`signal` given .* says `scored = False`"):
                Recipe(rule=whole)
    with pytest.raises(TokenWeightsError, match="`signal` None with the rule 'Longer'"):
        Recipe(rule=Longer(), signal=position)
    weights = Recipe(rule=Longer()).weighted(batch(), step=0).weights
    assert torch.equal(weights, batch().mask.float())


def test_a_rule_of_ones_own_on_a_named_recipe_weighs_by_its_signal():
    made = tw.recipe({"name": "predictive_high20", "rule": f"{__name__}:power_of_two"})
    entropy = torch.tensor([[1.0, 3.0, 0.0, 9.0], [2.0, 1.0, 9.0, 9.0]])
    weights = made.weighted(batch(predictive_entropy=entropy), step=0).weights
    assert weights.tolist() == [[2.0, 8.0, 1.0, 0.0], [4.0, 2.0, 0.0, 0.0]]


def test_functions_are_parts():
    made = tw.recipe({"signal": "position", "rule": f"{__name__}:power_of_two"})
    assert made.rule is power_of_two and tw.recipe(made.to_dict()) == made
    assert "Two to the score." in made.describe()


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda s, b, *, step, group=None: s * torch.nan, "finite under a True mask"),
        (lambda s, b, *, step, group=None: s - 9, ">= 0"),
        (lambda s, b, *, step, group=None: s[:1], r"of shape \(2, 4\)"),
        (lambda s, b, *, step, group=None: s.requires_grad_() * 1.0, "without a graph"),
        (lambda s, b, *, step, group=None: s.long(), "a float tensor"),
        (lambda s, b, *, step, group=None: None, "a float tensor"),
    ],
)
def test_what_a_users_rule_may_not_return(rule, words):
    made = Recipe(signal=signals.Position(), rule=rule)
    with pytest.raises(TokenWeightsError, match=words):
        made.weighted(batch(), step=0)


@pytest.mark.parametrize(
    ("signal", "words"),
    [
        (lambda b: torch.full((2, 4), torch.inf), "finite under a True mask"),
        (lambda b: torch.zeros(2, 3), r"of shape \(2, 4\)"),
        (lambda b: torch.zeros(2, 4, requires_grad=True) + 1, "without a graph"),
        (lambda b: b.mask, "a float tensor"),
    ],
)
def test_what_a_users_signal_may_not_return(signal, words):
    made = Recipe(signal=signal, rule=rules.Top())
    with pytest.raises(TokenWeightsError, match=words):
        made.weighted(batch(), step=0)


def test_a_users_values_off_the_mask_do_not_matter():
    def dirty(batch):
        return torch.where(batch.mask, 0.5, torch.nan)

    def rule(scores, batch, *, step, group=None):
        return torch.where(batch.mask, scores, -torch.inf)

    weights = Recipe(signal=dirty, rule=rule).weighted(batch(), step=0).weights
    assert torch.equal(weights, torch.where(batch().mask, 0.5, 0.0))


def test_a_part_that_cannot_be_imported_is_no_text():
    made = Recipe(signal=lambda batch: batch.mask.float(), rule=rules.Top())
    with pytest.raises(TokenWeightsError, match="one that can be imported"):
        made.to_dict()
    odd = Recipe(signal=Confident(torch.ones(2)), rule=rules.Top())
    with pytest.raises(TokenWeightsError, match="a plain value"):
        odd.to_dict()


def test_an_unknown_column_is_refused_when_the_recipe_is_made():
    class Signal:
        columns = ("log_prob",)

        def __call__(self, batch):
            return batch.log_prob

    with pytest.raises(TokenWeightsError, match="Did you mean 'log_probs'"):
        Recipe(signal=Signal(), rule=rules.Top())


@given(scored_masks(), st.sampled_from(SCORED_ONLY), st.integers(0, 200))
def test_every_recipe_gives_weights_and_a_denominator(case, name, step):
    scores, mask = case
    made = tw.recipe(name)
    given_scores = None if made.signal is None else scores.float()
    weights = made.token_weights(given_scores, mask, step=step)
    assert (weights >= 0).all() and (weights[~mask] == 0).all() and torch.isfinite(weights).all()
    scale = made.denominator_scale(weights, mask)
    token_loss = torch.where(mask, scores * 2 - 1, torch.nan).float()
    scaled = tw.weighted_token_mean(token_loss, mask, weights * scale)
    meant = tw.weighted_token_mean(token_loss, mask, weights, denominator=made.denominator)
    torch.testing.assert_close(scaled, meant)


def of_surprisals(made, *surprisals):
    log_probs = -torch.tensor([surprisals])
    mask = torch.ones(log_probs.shape, dtype=torch.bool)
    return made.weighted(RolloutBatch(mask=mask, log_probs=log_probs), step=0)


FALLING = field.Mapped(shape="exponential", slope=-1.0)


@pytest.mark.parametrize("denominator", get_args(Denominator))
def test_a_scale_that_float32_cannot_hold_is_refused(denominator):
    made = Recipe(signal=signals.Surprisal(), rule=FALLING, denominator=denominator)
    if denominator == "weight_sum":
        with pytest.raises(TokenWeightsError) as error:
            of_surprisals(made, 95.0, 96.0, 97.0, 120.0)
        assert str(error.value).startswith(
            "`Recipe.denominator_scale`: expected `weights` with a mean of 0, or of at least 3e-39,"
        )
    else:
        rollout = of_surprisals(made, 95.0, 96.0, 97.0, 120.0)
        assert torch.isfinite(rollout.weights * rollout.scale).all()
    # The largest surprisals that go through, and those that leave no weight at all.
    rollout = of_surprisals(made, 86.0, 87.0)
    want = torch.tensor([[1.0, math.exp(-1)]], dtype=torch.float64)
    share = {"weight_sum": want * 2 / want.sum()}.get(denominator, want * math.exp(-86))
    product = (rollout.weights * rollout.scale).double()
    torch.testing.assert_close(product, share, rtol=1e-5, atol=0)
    assert not of_surprisals(made, 200.0, 300.0).weights.any()


def test_weights_that_nothing_can_be_divided_by_are_refused_when_a_rule_is_made():
    for part, name in (
        (rules.Top, "inside"),
        (rules.Bottom, "outside"),
        (field.Mapped, "low"),
        (field.Mapped, "high"),
        (field.Damped, "floor"),
    ):
        for value in (1e-42, 9e-21, 2e30, -1.0, math.nan, math.inf):
            with pytest.raises(TokenWeightsError, match=f"`{part.kind}`: expected `{name}` .*e-20"):
                part(**{name: value})
        part(**{name: 1e-20})
    assert rules.Top(inside=0.0, outside=1e30) and field.Mapped(low=0.0, high=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_that_leaves_float32_no_room_is_refused(dtype):
    """Times the scale of a mask, and as float32, it would be infinite."""

    def rule(scores, batch, *, step, group=None):
        return torch.full(batch.mask.shape, 1e38 if dtype == torch.float32 else 1e39, dtype=dtype)

    made = Recipe(signal=signals.Position(), rule=rule)
    with pytest.raises(TokenWeightsError, match="`rule`: expected `weights` at most 1e\\+30 under"):
        made.weighted(batch(), step=0)
    large = combine.Product(
        rules=(rules.Top(fraction=0.1, inside=1e30), rules.Top(fraction=0.1, inside=1e8))
    )
    made = Recipe(signal=signals.Position(), rule=large, denominator="selected_tokens")
    with pytest.raises(TokenWeightsError, match="`product`: expected `weights` at most 1e\\+30"):
        made.weighted(batch(), step=0)
    most = Recipe(
        signal=signals.Position(),
        rule=rules.Top(fraction=0.1, inside=1e30),
        denominator="selected_tokens",
    )
    rollout = most.weighted(batch(), step=0)
    assert torch.isfinite(rollout.weights * rollout.scale).all() and rollout.weights.any()


def test_match_mass_keeps_the_mean_weight_at_one():
    made = tw.recipe({"name": "low2high", "match_mass": True})
    mask = torch.ones(2, 50, dtype=torch.bool)
    for step in (0, 30, 100):
        assert made.token_weights(torch.rand(2, 50), mask, step=step).mean() == pytest.approx(1)


@pytest.mark.parametrize("name", NAMES)
def test_a_negative_step_is_refused_by_every_rule(name):
    made, ones = tw.recipe(name), torch.ones(1, 3)
    scores = None if made.signal is None else ones
    with pytest.raises(TokenWeightsError, match="`step`"):
        made.token_weights(scores, ones.bool(), step=-1, token_groups=ones.long())


def test_missing_inputs_are_refused():
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(TokenWeightsError, match="scores"):
        tw.recipe("low2high").token_weights(None, mask, step=0)
    with pytest.raises(TokenWeightsError, match="token_ids"):
        tw.recipe("type_matched20").token_weights(torch.rand(1, 2), mask, step=0)
    with pytest.raises(TokenWeightsError, match="finite"):
        tw.recipe("low2high").token_weights(torch.full((1, 2), math.nan), mask, step=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_scores_that_are_not_finite_are_refused_under_the_name_that_was_called(name, value):
    made, mask = tw.recipe(name), torch.tensor([[True, True, True, False]])
    scores, fine = torch.tensor([[1.0, value, 2.0, 0.5]]), torch.tensor([[1.0, 0.5, 2.0, value]])
    columns = dict.fromkeys(("log_probs", "sampler_log_probs"), -torch.ones(1, 4))
    columns |= {"predictive_entropy": torch.ones(1, 4), "advantages": torch.ones(1, 1)}
    columns |= {"token_ids": torch.ones(1, 4).long(), "prompt_ids": torch.zeros(1).long()}
    made = made.placed(36)
    columns["attention"] = dict.fromkeys(made.readings, torch.ones(1, 4))
    given = RolloutBatch(mask=mask, **columns)
    calls = {"Recipe.weighted_scores": lambda scores: made.weighted_scores(scores, given, step=0)}
    if not {*columns_of(made.rule)} - {"token_ids"}:
        groups = {"step": 0, "token_groups": given.token_ids}
        calls |= {
            "Recipe.token_weights": lambda scores: made.token_weights(scores, mask, **groups),
            "weighted_rollout": lambda scores: tw.weighted_rollout(made, scores, mask, **groups),
        }
    for caller, call in calls.items():
        with pytest.raises(TokenWeightsError) as error:
            call(scores)
        assert str(error.value).startswith(
            f"`{caller}`: expected `scores` finite under a True mask, got {value} at index (0, 1)"
        )
        call(fine)


@pytest.mark.parametrize("name", ["relative_surprisal_band", "covariance_drop"])
def test_bands_refuse_scores_that_are_not_finite(name):
    mask, made = torch.ones(1, 3).bool(), tw.recipe(name)
    with pytest.raises(TokenWeightsError, match=r"`Recipe.token_weights`: expected `scores` fini"):
        made.token_weights(torch.tensor([[math.nan, 1.0, 2.0]]), mask, step=0)


def test_scores_of_another_shape_are_refused():
    made = Recipe(signal=signals.Position(), rule=rules.Top())
    for shape in ((1, 4), (2, 1), (2, 5)):
        with pytest.raises(TokenWeightsError, match=r"`scores` of shape \(2, 4\) as the mask"):
            made.weighted_scores(torch.ones(shape), batch(), step=0)


def test_missing_scores_are_refused_under_the_name_that_was_called():
    made, given = tw.recipe("low2high"), batch()
    for caller, call in {
        "Recipe.weighted_scores": lambda: made.weighted_scores(None, given, step=0),
        "Recipe.token_weights": lambda: made.token_weights(None, given.mask, step=0),
        "weighted_rollout": lambda: tw.weighted_rollout(made, None, given.mask, step=0),
    }.items():
        with pytest.raises(TokenWeightsError, match=f"`{caller}`: expected `scores` given"):
            call()


def test_a_recipe_is_frozen_and_changed_by_replacement():
    made = tw.recipe("low2high")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.name = "other"
    assert dataclasses.replace(made, name="other").rule == made.rule
