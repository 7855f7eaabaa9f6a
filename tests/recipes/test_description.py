import dataclasses

import pytest

import tokenweights as tw
from tokenweights.recipes import combine, field, kinds, preplan, rules, signals
from tokenweights.recipes.rules import EndpointWeights, Top
from tokenweights.recipes.signals import AttentionEntropy


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


LAYERS = AttentionEntropy(layers=(3, 4))
TOP = Top()
# Parts in a form in which the fields count, each with another value for these.
CASES = [
    (LAYERS, {"layers": (3, 5), "layer_reduction": "rank_mean", "alignment": "own"}),
    (AttentionEntropy(entropy_kind="topk"), {"top_k": 257, "entropy_kind": "raw"}),
    (AttentionEntropy(entropy_kind="fixed"), {"fixed_k": 257}),
    (signals.PositionSigmoid(), {"steepness": 15.0000001, "middle": 0.5000001}),
    (EndpointWeights(), {"form": "literal", "temperature": 1.0000001}),
    (EndpointWeights(form="literal"), {"eps": 1.0000001e-8}),
    (rules.Bottom(), {"fraction": 0.2000001, "scope": "batch", "sign": "positive"}),
    (rules.Bottom(), {"inside": 1.0000001, "outside": 1e-7}),
    (TOP, {"fraction": 0.2000001, "scope": "prompt", "sign": "negative"}),
    (TOP, {"inside": 1.0000001, "outside": 1e-7}),
    (rules.Front(), {"fraction": 0.2000001}),
    (rules.Back(), {"fraction": 0.2000001}),
    (rules.Random(), {"fraction": 0.2000001, "seed": 1}),
    (rules.Bernoulli(), {"fraction": 0.2000001, "seed": 1}),
    (rules.TypeMatched(), {"fraction": 0.2000001, "matched_to": "top", "seed": 1}),
    (rules.PositionMatched(), {"fraction": 0.2000001, "matched_to": "top", "seed": 1}),
    (rules.PositionMatched(), {"position_bins": 11}),
    (field.Mapped(), {"normalise": "mean", "shape": "sigmoid", "slope": -1.0, "offset": 1e-7}),
    (field.Mapped(normalise="range"), {"scope": "prompt", "per": "response"}),
    (field.Mapped(), {"low": 1e-7, "high": 1.0000001}),
    (field.Within(low=0.1, high=0.2), {"low": 0.11, "high": 0.21, "weight": "score"}),
    (field.AboveQuantile(), {"quantile": 0.8000001, "scope": "prompt"}),
    (field.Bonus(scale=0.1), {"scale": 0.1000001, "share": 2.0000001, "towards": "sign"}),
    (field.RandomDrop(low=1.0, high=5.0), {"low": 1.1, "high": 5.1, "fraction": 3e-4, "seed": 1}),
    (field.RarePositives(), {"probability": 0.003, "quantile": 0.7500001, "among": "all"}),
    (field.SecondMoment(), {"bound": 0.0400001}),
    (
        signals.BackwardDistance(layers=(3,), heads=((0, 1),)),
        {"bound": 11, "layers": (4,), "heads": ((0, 2),)},
    ),
    (
        signals.FutureInfluence(layers=(3,), heads=((0, 1),)),
        {"first": 11, "last": 51, "layers": (4,), "heads": ((0, 2),)},
    ),
    (preplan.PreplanAnchor(), {"chosen": "preplan", "fraction": 0.4000001, "boost": 1.5000001}),
    (
        preplan.PreplanAnchor(chosen="coupled"),
        {"passed": 0.5000001, "reach": 4, "near": 0.5000001},
    ),
    (
        preplan.PreplanAnchor(),
        {
            "distance": signals.BackwardDistance(bound=9),
            "influence": signals.FutureInfluence(last=None),
        },
    ),
    (preplan.RandomCredit(), {"fraction": 0.4000001, "boost": 1.5000001, "seed": 1}),
    (field.Damped(), {"floor": 0.8000001, "least": 0.0200001}),
    (combine.Ranked(signal=LAYERS), {"signal": signals.Surprisal()}),
    (combine.MeanOf(signals=(LAYERS,)), {"signals": (LAYERS, signals.Surprisal())}),
    (combine.BySign(positive=TOP, negative=TOP), {"positive": rules.Bottom()}),
    (combine.BySign(positive=TOP, negative=TOP), {"negative": rules.Bottom()}),
    (combine.Product(rules=(TOP,)), {"rules": (TOP, rules.Front())}),
    (combine.On(signal=LAYERS, rule=TOP), {"signal": signals.Surprisal(), "rule": rules.Bottom()}),
    (combine.BatchMean(signal=LAYERS, below=0.3), {"signal": signals.Surprisal(), "below": 0.31}),
    (combine.BatchMean(signal=LAYERS, below=0.3), {"above": 0.1}),
    (combine.Steps(stop=9), {"start": 1, "stop": 8}),
    (
        combine.Gate(rule=TOP, when=combine.Steps(stop=9)),
        {"rule": rules.Bottom(), "when": combine.Steps(stop=8), "otherwise": rules.Front()},
    ),
]


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [(part, name, value) for part, changes in CASES for name, value in changes.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_field_shows_where_it_counts(part, field, value):
    changed = dataclasses.replace(part, **{field: value})
    assert "\n".join(changed.lines()) != "\n".join(part.lines())


def test_every_field_of_every_part_is_looked_at():
    shown = {(type(part), name) for part, changes in CASES for name in changes}
    schedule = {(EndpointWeights, name) for name in ("low", "high", "schedule", "warmup_steps")}
    fields = {
        (made, item.name)
        for made in (*kinds.SIGNALS, *kinds.RULES, *kinds.CONDITIONS)
        for item in dataclasses.fields(made)
    }
    assert fields - shown == schedule  # in a line of its own


@pytest.mark.parametrize(
    ("name", "value"),
    [("low", (1.0000001, 0.0)), ("high", (0.0, 0.9999999)), ("schedule", "cosine")],
)
def test_the_schedule_shows(name, value):
    made = EndpointWeights()
    other = dataclasses.replace(made, **{name: value})
    assert other.schedule_line() != made.schedule_line()
    longer = dataclasses.replace(other, warmup_steps=101)
    assert longer.schedule_line() != other.schedule_line()


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "other"), ("denominator", "weight_sum"), ("match_mass", True)],
)
def test_every_field_of_a_recipe_shows(field, value):
    made = tw.recipe("low2high")
    assert dataclasses.replace(made, **{field: value}).describe() != made.describe()
