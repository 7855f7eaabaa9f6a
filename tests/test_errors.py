import pytest

import tokenweights as tw
from tokenweights import TokenWeightsError
from tokenweights._errors import invalid, nearest


def test_errors_follow_the_template():
    error = invalid("f", "x", "in [0, 1]", 2, "Divide by 2.")
    assert isinstance(error, TokenWeightsError) and isinstance(error, ValueError)
    assert str(error) == "`f`: expected `x` in [0, 1], got 2. Divide by 2."


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("low2hig", "low2high"),
        ("anchr20", "anchor20"),
        ("anchor", "anchor20"),
        ("low_to_high", "low2high"),
        ("nope", None),
        ("foo", None),
        ("uniform", None),
        ('{"name": "low2high", "warmup_steps": 20}', None),
    ],
)
def test_a_misspelt_recipe_has_a_nearest_one_and_another_word_has_none(value, expected):
    assert nearest(value, tw.recipe_names()) == expected


def test_a_part_of_a_long_name_can_be_near_enough_to_it():
    names = ["step", "completions/mean_length"]
    assert nearest("length", names) is None
    assert nearest("length", names, cutoff=0.4) == "completions/mean_length"
