import pytest

import tokenweights as tw
from tokenweights import Recipe, TokenWeightsError
from tokenweights.recipes.rules import Bottom, EndpointWeights
from tokenweights.recipes.signals import AttentionEntropy

PAPER = {
    "full", "random20", "bernoulli20", "anchor20_all_tokens", "explorer20_all_tokens",
    "low2high_layer8", "low2high_layer20", "low2high_layer31", "anchor20",
    "explorer20", "low2high", "high2low", "static_anchor",
    "static_explorer", "front20", "back20", "predictive_low20", "predictive_high20", "loss_low20",
    "loss_high20", "type_matched20", "position_matched20",
}  # fmt: skip


def test_every_run_of_the_paper_has_a_name():
    assert set(tw.recipe_names(source="paper")) == PAPER
    for name in tw.recipe_names():
        assert tw.recipe(name).name == name


def test_a_named_recipe_with_changes():
    made = tw.recipe({"name": "anchor20", "fraction": 0.4})
    assert (made.rule, made.denominator) == (Bottom(fraction=0.4), "selected_tokens")
    assert tw.recipe(made) is made
    assert tw.recipe(made.to_dict()) == made
    whole = Recipe(signal=AttentionEntropy(), rule=EndpointWeights())
    assert tw.recipe({"rule": "endpoints"}) == whole
    assert tw.recipe({"name": "low2high", "layers": 3}).layers == (3,)


def test_a_rule_beside_a_known_name_keeps_what_the_name_stands_for():
    made = tw.recipe({"name": "high2low", "rule": "endpoints", "warmup_steps": 50})
    assert made.rule.endpoints(0) == tw.Endpoints(0.0, 1.0)
    made = tw.recipe({"name": "anchor20", "rule": "bottom", "fraction": 0.1})
    assert made.denominator == "selected_tokens"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("low2hihg", "Did you mean 'low2high'"),
        ({"name": "ancor20"}, "Did you mean 'anchor20'"),
        ({"name": "low2high", "warmup": 5}, "Did you mean 'warmup_steps'"),
        ({"warmup_steps": 5}, "`name`"),
        ("", "Choose one of"),
        ({"name": ["low2high"]}, "`name`"),
    ],
)
def test_unknown_names_and_keys_are_refused_with_the_nearest_one(name, words):
    with pytest.raises(TokenWeightsError) as error:
        tw.recipe(name)
    assert words in str(error.value)
