import pytest

import tokenweights as tw


@pytest.mark.parametrize("name", tw.recipe_names())
def test_every_recipe_describes_itself_in_short_lines(name):
    text = tw.recipe(name).describe()
    assert text.startswith(f"recipe   {name}\n") and "loss     sum w l" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_low2high_names_its_equations():
    text = tw.recipe({"name": "low2high", "warmup_steps": 70, "match_mass": True}).describe()
    for words in ("Eq. 13", "Eq. 26, 27", "Eq. 28", "Eq. 29, 30", "70 steps", "mean 1"):
        assert words in text
