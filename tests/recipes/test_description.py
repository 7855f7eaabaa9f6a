import dataclasses

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


@pytest.mark.parametrize(
    ("fraction", "words"), [(0.125, "12.5%"), (0.005, "0.5%"), (0.07, "7%"), (1, "100%")]
)
def test_a_share_is_not_rounded(fraction, words):
    for name in ("anchor20", "front20", "random20", "type_matched20", "position_matched20"):
        assert f" {words} of each" in tw.recipe({"name": name, "fraction": fraction}).describe()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "step", "constant"])
def test_only_the_papers_schedule_has_its_equations(schedule):
    text = tw.recipe({"name": "low2high", "schedule": schedule}).describe()
    assert ("Eq. 29, 30" in text) == (schedule == "linear")


BASES = {
    "low2high": {"layers": (3, 4), "form": "literal"},
    "low2high_layer8": {},
    "anchor20": {"entropy_kind": "topk"},
    "explorer20": {"entropy_kind": "fixed"},
    **{name: {} for name in ("bernoulli20", "random20", "position_matched20", "type_matched20")},
}
CHANGES = {
    "name": "other",
    "fraction": 0.2000001,
    "matched_to": "top",
    "position_bins": 11,
    "low": (1.0000001, 0.0),
    "high": (0.0, 0.9999999),
    "schedule": "cosine",
    "warmup_steps": 101,
    "temperature": 1.0000001,
    "form": "stable",
    "eps": 1.0000001e-8,
    "layers": (3, 5),
    "layer_reduction": "rank_mean",
    "entropy_kind": "raw",
    "top_k": 257,
    "fixed_k": 257,
    "alignment": "own",
    "denominator": "weight_sum",
    "match_mass": True,
    "seed": 1,
    "rule": "top",
    "signal": "predictive_entropy",
}


@pytest.mark.parametrize("field", [item.name for item in dataclasses.fields(tw.Recipe)])
def test_every_field_shows_where_it_counts(field):
    """Beside at least one base, and wherever the weights or the loss would be others."""
    shown = set()
    for name, extra in BASES.items():
        made = tw.recipe({"name": name, **extra})
        try:
            other = dataclasses.replace(made, **{field: CHANGES[field]})
        except tw.TokenWeightsError:  # a signal beside a rule without one
            continue
        if made.describe() != other.describe():
            shown.add(name)
    rules = {"seed": {"bernoulli20", "random20", "position_matched20", "type_matched20"}}
    assert shown and rules.get(field, shown) <= shown
