"""What papers say: said of every rule of the field, printed, and a reason for what is no weight."""

import pytest

import tokenweights as tw
from tokenweights import TokenWeightsError
from tokenweights.recipes import field_named, kinds, signals
from tokenweights.recipes.parts import parts_of
from tokenweights.recipes.published import NO_WEIGHTS, PUBLISHED

FIELD = [made.name for made in field_named.RECIPES]
# Parts that look at the rollout batch, beside those that say so by their scope.
OVER_THE_BATCH = {"covariance", "random_drop", "rare_positives", "second_moment", "damped"}


def test_every_rule_of_the_field_says_where_it_comes_from():
    assert sorted(PUBLISHED) == sorted(FIELD) == sorted(tw.recipe_names(source="field"))
    for published in PUBLISHED.values():
        assert published.source and published.scope
        assert published.when in ("rollout", "update")


@pytest.mark.parametrize("name", FIELD)
def test_a_description_has_source_scopes_and_time(name):
    published, lines = PUBLISHED[name], tw.recipe(name).describe().splitlines()
    place = lines.index(f"source   {published.source}")
    notes = lines[place + 1 : place + 1 + len(published.notes)]
    assert [note.strip() for note in notes] == list(published.notes)
    scope, when = lines[place + 1 + len(notes) :]
    assert scope == f"scope    {published.own_scope}; published: {published.scope}"
    assert when == f"when     rollout; published: {published.when}"


@pytest.mark.parametrize("name", FIELD)
def test_the_scope_it_names_is_the_scope_of_its_parts(name):
    made = tw.recipe(name)
    scopes = {"token"}
    for part in (*parts_of(made.rule), *parts_of(made.signal)):
        normalised = getattr(part, "normalise", "") != "none"
        if part.kind in OVER_THE_BATCH:
            scopes.add("rollout batch")
        elif hasattr(part, "scope") and normalised:
            scopes.add({"batch": "rollout batch"}.get(part.scope, part.scope))
        elif isinstance(part, signals.PositionSigmoid):
            scopes.add("response")
    own = PUBLISHED[name].own_scope
    widest = next(s for s in ("rollout batch", "prompt", "response", "token") if s in scopes)
    assert own.removesuffix(" by sign of A") == widest
    assert "mini-batch" not in own and "optimizer" not in own


@pytest.mark.parametrize("name", tw.recipe_names(source="paper"))
def test_the_papers_own_runs_are_no_rules_of_the_field(name):
    text = tw.recipe(name).describe()
    assert "source " not in text and "published" not in text


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_what_is_no_weight_is_refused_with_its_reason(name):
    for given in (name, {"name": name}, {"name": name, "fraction": 0.1}):
        with pytest.raises(TokenWeightsError, match="can carry") as error:
            tw.recipe(given)
        assert NO_WEIGHTS[name] in str(error.value) and repr(name) in str(error.value)


def test_a_recipe_that_a_reason_points_to_is_there():
    assert "`entropy_proportional`" in NO_WEIGHTS["gtpo"] and "entropy_proportional" in FIELD


def test_no_two_things_have_one_name():
    names = [*tw.recipe_names(), *NO_WEIGHTS]
    assert len(set(names)) == len(names)
    parts = [made.kind for made in (*kinds.SIGNALS, *kinds.RULES, *kinds.CONDITIONS)]
    assert len(set(parts)) == len(parts) and "none" not in parts
    assert [made.name for made in map(tw.recipe, tw.recipe_names())] == list(tw.recipe_names())


def test_no_two_names_stand_for_one_recipe():
    made = [tw.recipe(name).to_dict() | {"name": ""} for name in tw.recipe_names()]
    for place, one in enumerate(made):
        assert one not in made[:place], tw.recipe_names()[place]
