"""Recipes side by side: effects worked by hand, and numbers that no order of the runs changes."""

import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweights import TokenWeightsError, bootstrap_interval, recipe
from tokenweights.report import (
    RecipeRun,
    append_metrics,
    comparison_figure,
    comparison_html,
    recipe_comparison,
    recipe_run_from_directory,
)
from tokenweights.report.comparison_page import comparison_tables

NAN = math.nan


def run(name, seed, rewards, **columns):
    """A run that logged one reward a step from step 0, and columns of the same length."""
    lines = [{"step": step, "reward": value} for step, value in enumerate(rewards)]
    for column, values in columns.items():
        for line, value in zip(lines, values, strict=True):
            line[f"token_weights/{column}"] = value
    return RecipeRun(name, seed, lines)


def results(runs, **options):
    return {result.recipe: result for result in recipe_comparison(runs, **options).results}


# Numbers.


def test_paired_effects_worked_by_hand():
    # The recipe is better by 1, 2, 3 at the end and by 1, 1.5, 2 on average, whatever the seed's
    # own luck is: of three pairs the bootstrap draws each alone with chance 1/27 > 2.5 %.
    luck = (0.0, 10.0, -20.0)
    runs = [run("full", seed, [luck[seed], luck[seed]]) for seed in range(3)]
    runs += [run("a", seed, [luck[seed] + 1, luck[seed] + 1 + seed]) for seed in range(3)]
    found = results(runs)
    effect = found["a"].effect
    assert effect is not None and effect.seeds == (0, 1, 2)
    assert (effect.final.mean, effect.final.low, effect.final.high) == (2.0, 1.0, 3.0)
    assert (effect.mean.mean, effect.mean.low, effect.mean.high) == (1.5, 1.0, 2.0)
    assert found["full"].effect is None
    assert found["full"].final.mean == pytest.approx(-10 / 3)
    assert found["a"].curve == pytest.approx((-10 / 3 + 1, -10 / 3 + 2))
    assert found["full"].spread == pytest.approx([np.std(luck, ddof=1)] * 2)


def test_only_shared_seeds_are_paired():
    runs = [run("full", seed, [value]) for seed, value in ((0, 1.0), (1, 5.0), (7, 100.0))]
    runs += [run("a", seed, [value]) for seed, value in ((1, 6.0), (0, 4.0), (9, -50.0))]
    comparison = recipe_comparison(runs)
    effect = comparison.results[1].effect
    assert effect is not None and effect.seeds == (0, 1)
    assert effect.final.mean == (3.0 + 1.0) / 2
    assert any("leaves out the seeds" in note for note in comparison.notes)


def test_unpaired_effects_agree_with_all_resamples():
    one, two = [0.0, 1.0, 5.0], [2.0, 2.5]
    runs = [run("full", seed, [value]) for seed, value in enumerate(one)]
    runs += [run("a", seed + 10, [value]) for seed, value in enumerate(two)]
    effect = results(runs)["a"].effect
    assert effect is not None and effect.seeds == ()
    assert effect.final.mean == pytest.approx(2.25 - 2.0)

    def means(values):
        grid = np.meshgrid(*[values] * len(values))
        return np.mean(grid, axis=0).ravel()

    every = np.subtract.outer(means(two), means(one)).ravel()
    expected = np.quantile(every, [0.025, 0.975])
    assert [effect.final.low, effect.final.high] == pytest.approx(expected, abs=0.2)


def test_an_interval_is_that_of_the_library():
    values = [0.1, 0.4, 0.7, 0.2]
    found = results([run("full", seed, [0.0, value]) for seed, value in enumerate(values)])["full"]
    assert found.final == bootstrap_interval(torch.tensor(values, dtype=torch.float64))


def test_one_seed_has_no_interval():
    comparison = recipe_comparison([run("full", 0, [1.0]), run("a", 0, [3.0]), run("b", 1, [2.0])])
    full, a, b = comparison.results
    assert full.final.mean == 1.0 and math.isnan(full.final.low) and full.spread == ()
    assert a.effect.final.mean == 2.0 and math.isnan(a.effect.final.high)
    assert b.effect.final.mean == 1.0 and math.isnan(b.effect.mean.low) and not b.effect.seeds
    assert "1 seed: no interval (full, a, b)." in comparison.notes
    ways = [row[-1] for row in comparison_tables(comparison)[1].rows]
    assert ways == ["paired, 1 seed: no interval", "unpaired, 1 and 1 seeds: no interval"]


def test_runs_of_different_length_are_compared_over_common_steps():
    comparison = recipe_comparison([run("full", 0, [1.0, 2.0]), run("a", 0, [1.0, 4.0, 900.0])])
    assert comparison.steps == (0, 1)
    assert comparison.results[1].final.mean == 4.0 and comparison.results[1].mean.mean == 2.5
    assert "Runs logged different steps, 2 to 3 of them" in comparison.notes[0]
    assert "2 steps they have in common" in comparison.notes[0]


@pytest.mark.parametrize("gap", [NAN, math.inf])
def test_a_step_that_is_not_finite_is_left_out_of_every_run(gap):
    comparison = recipe_comparison([run("full", 0, [1.0, 50.0, 3.0]), run("a", 0, [2.0, gap, 4.0])])
    assert comparison.steps == (0, 2)
    assert comparison.results[0].mean.mean == 2.0 and comparison.results[1].mean.mean == 3.0
    assert "a, seed 0: not finite at 1 step" in comparison.notes[0]


def test_weights_are_means_over_steps_and_seeds_or_missing():
    size, weights = "effective_sample_size", "weight_mean"
    runs = [run("full", seed, [0.0, 0.0]) for seed in (0, 1)]
    runs += [
        run("a", 0, [0.0, 0.0], **{weights: [0.2, 0.4], size: [1.0, 0.5]}),
        run("a", 1, [0.0, 0.0, 0.0], **{weights: [0.6, NAN, 99.0]}),
    ]
    found = results(runs)
    assert found["a"].weight_mean == pytest.approx((0.3 + 0.6) / 2)
    assert math.isnan(found["a"].effective_sample_size) and math.isnan(found["full"].weight_mean)
    rows = comparison_tables(recipe_comparison(runs))[0].rows
    assert [row[-2:] for row in rows] == [("-", "-"), ("0.450", "-")]


def test_the_metric_can_be_chosen_and_a_step_logged_twice_counts_once():
    lines = [{"step": 0, "accuracy/easy": value} for value in (9.0, 0.5)]
    runs = [RecipeRun("full", 0, lines), RecipeRun("a", 0, [{"step": 0, "accuracy/easy": 0.75}])]
    comparison = recipe_comparison(runs, metric="accuracy/easy")
    assert comparison.metric == "accuracy/easy"
    assert comparison.results[1].effect.final.mean == 0.25


def test_rewards_of_different_trainers_are_understood_and_named():
    lines = [{"step": 0, "critic/rewards/mean": 1.0}]
    comparison = recipe_comparison([run("full", 0, [0.0]), RecipeRun("a", 0, lines)])
    assert comparison.results[1].effect.final.mean == 1.0
    assert any("reward or critic" in note or "critic/rewards" in note for note in comparison.notes)


def test_without_the_baseline_there_are_no_effects():
    comparison = recipe_comparison([run("a", 0, [0.0]), run("b", 0, [1.0])], baseline="bb")
    assert comparison.baseline is None
    assert [result.effect for result in comparison.results] == [None, None]
    assert "No run of the baseline bb: effects are left out. Did you mean b?" in comparison.notes
    assert len(comparison_tables(comparison)) == 1


rewards = st.lists(st.floats(-10, 10) | st.sampled_from([NAN, 0.1]), min_size=4, max_size=6)
runs_in_two_orders = st.lists(
    st.builds(run, st.sampled_from(["full", "a", "b"]), st.integers(0, 3), rewards),
    min_size=2,
    max_size=6,
    unique_by=lambda made: (made.recipe, made.seed),
).flatmap(lambda runs: st.tuples(st.just(runs), st.permutations(runs)))


@settings(max_examples=40, deadline=None)
@given(runs_in_two_orders)
def test_the_order_of_runs_changes_nothing(orders):
    def told(runs):
        try:
            return repr(recipe_comparison(runs))  # NaN is unlike itself, and written alike
        except TokenWeightsError as error:
            return str(error)

    one, other = map(told, orders)
    assert one == other


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=5), st.floats(-100, 100))
def test_what_seeds_share_leaves_no_trace_in_paired_effects(luck, better):
    runs = [run("full", seed, [value]) for seed, value in enumerate(luck)]
    runs += [run("a", seed, [value + better]) for seed, value in enumerate(luck)]
    final = results(runs)["a"].effect.final
    assert [final.mean, final.low, final.high] == pytest.approx([better] * 3, abs=1e-9)


# What is refused.


REFUSED = {
    "one run": ([run("full", 0, [0.0])], {}, "at least two, got 1"),
    "no run": ([], {}, "at least two, got 0"),
    "a twin": ([run("full", 0, [0.0]), run("full", 0, [1.0])], {}, "full, seed 0, twice"),
    "no reward": ([run("full", 0, []), run("a", 0, [])], {}, "every run logged, got 'reward'"),
    "a misspelt metric": (
        [run("full", 0, [0.0]), run("a", 0, [0.0])],
        {"metric": "rewards"},
        "Did you mean 'reward'",
    ),
    "no metric": ([run("full", 0, [0.0]), run("a", 0, [0.0])], {"metric": ""}, "that every run"),
    "a metric of some runs": (
        [run("full", 0, [0.0]), run("a", 0, [0.0], weight_mean=[1.0])],
        {"metric": "token_weights/weight_mean"},
        "not in full, seed 0. Leave these runs out",
    ),
    "the step as metric": (
        [run("full", 0, [0.0]), run("a", 0, [0.0])],
        {"metric": "step"},
        "that every run logged",
    ),
    "no common step": (
        [run("full", 0, [0.0]), RecipeRun("a", 0, [{"step": 5, "reward": 1.0}])],
        {},
        "a step in common, got 0 steps",
    ),
    "nothing finite": ([run("full", 0, [NAN]), run("a", 0, [1.0])], {}, "none of them finite"),
    "huge numbers": ([run("full", 0, [1e300]), run("a", 0, [1.0])], {}, "within 1e+100 of 0"),
    "two recipes of one name": (
        [
            replace(run("low2high", seed, [0.0]), description=recipe(made).describe())
            for seed, made in enumerate(["low2high", {"name": "low2high", "warmup_steps": 7}])
        ],
        {},
        "low2high of two kinds",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused(case):
    runs, options, words = REFUSED[case]
    with pytest.raises(TokenWeightsError) as caught:
        recipe_comparison(runs, **options)
    assert words in str(caught.value)


def test_the_draws_of_a_rule_may_differ_between_seeds():
    made = [recipe({"name": "random20", "seed": seed}).describe() for seed in (0, 5)]
    runs = [replace(run("random20", seed, [0.0]), description=made[seed]) for seed in (0, 1)]
    assert len(recipe_comparison(runs).results) == 1


# Directories.


def written(folder, described=None):
    append_metrics(folder / "metrics.jsonl", {"step": 0, "reward": 0.5})
    if described is not None:
        text = described if isinstance(described, str) else json.dumps(described)
        (folder / "run.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({"recipe": "low2high", "seed": 3}, ("low2high", 3)),
        ({"recipe": "my own", "settings": {"seed": 0}}, ("my own", 0)),
        ({"recipe": {"name": "low2high", "warmup_steps": 9}, "seed": 3}, ("low2high", 3)),
        ({"recipe": recipe("high2low").describe(), "settings": {"seed": 4}}, ("high2low", 4)),
        ({"recipe": recipe("high2low").to_dict(), "title": "t", "seed": 4}, ("high2low", 4)),
    ],
)
def test_a_description_names_recipe_and_seed(described, expected, tmp_path):
    for name in ("anything", "other-seed9"):  # what is written goes before the name
        messages = []
        found = recipe_run_from_directory(
            written(tmp_path / name, described), unreadable=messages.append
        )
        assert (found.recipe, found.seed) == expected and messages == []


@pytest.mark.parametrize(
    ("place", "described", "expected"),
    [
        ("full-seed0", None, ("full", 0)),
        ("my-own-mix-seed12", None, ("my-own-mix", 12)),
        ("low2high/seed3", None, ("low2high", 3)),
        ("full-seed7", {"title": "t"}, ("full", 7)),
        ("full-seed7", {"recipe": "two lines\nof words"}, ("full", 7)),
        ("full-seed7", {"recipe": "high2low"}, ("high2low", 7)),
        ("full-seed7", {"settings": {"seed": 2}}, ("full", 2)),
        ("full-seed7", {"settings": {"seed": "2"}}, ("full", 7)),
    ],
)
def test_a_name_stands_in_for_a_description(place, described, expected, tmp_path, monkeypatch):
    folder = written(tmp_path / place, described)
    assert recipe_run_from_directory(folder, unreadable=print).place == str(folder)
    monkeypatch.chdir(folder)
    found = recipe_run_from_directory(".", unreadable=print)
    assert (found.recipe, found.seed) == expected


@pytest.mark.parametrize(
    ("place", "described", "words"),
    [
        ("demo", None, "no recipe and seed"),
        ("demo", {"recipe": "full"}, "no seed"),
        ("demo", {"seed": 1}, "no recipe"),
        ("full-seed", None, "no recipe and seed"),
        ("full-seed0", "{", "to be JSON"),
        ("full-seed0", "[" * 100_000, "to be JSON"),
        ("full-seed0", "[]", "one JSON object"),
        ("full-seed0", {"seed": "one"}, "a whole number as seed"),
        ("full-seed0", {"seed": True}, "a whole number as seed"),
        ("full-seed0", {"recipe": {"name": "low3high"}}, "low2high"),
        ("full-seed0", {"recipe": {"name": "full", "colour": 1}}, "colour"),
    ],
)
def test_an_unknown_recipe_or_seed_is_refused(place, described, words, tmp_path):
    with pytest.raises(TokenWeightsError, match=r"directory|run\.json") as caught:
        recipe_run_from_directory(written(tmp_path / place, described), unreadable=print)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["metrics.jsonl", "tokens.jsonl"])
def test_a_directory_without_metrics_is_refused(name, tmp_path):
    folder = tmp_path / "full-seed0"
    with pytest.raises(TokenWeightsError, match="to be a directory"):
        recipe_run_from_directory(folder)
    folder.mkdir()
    with pytest.raises(TokenWeightsError, match=r"metrics\.jsonl"):
        recipe_run_from_directory(folder)
    (folder / name).write_text("")
    with pytest.raises(TokenWeightsError, match="no step"):
        recipe_run_from_directory(folder)


def test_an_endless_integer_is_no_traceback(tmp_path):
    folder = written(tmp_path / "full-seed0")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "reward": 1' + "0" * 400 + "}\n")
    try:
        recipe_run_from_directory(folder, unreadable=print)
    except TokenWeightsError as error:
        assert "that a float holds" in str(error)


def test_token_records_are_not_read_and_evaluations_are(tmp_path):
    folder = written(tmp_path / "full-seed0")
    (folder / "tokens.jsonl").write_text("no record")
    append_metrics(folder / "evaluations.jsonl", {"step": 0, "accuracy/easy": 0.5})
    found = recipe_run_from_directory(folder)
    assert {"step": 0, "accuracy/easy": 0.5} in found.metrics


# The figure and the page.


def test_the_figure_draws_means_and_bands():
    runs = [run("full", seed, [0.0, float(seed)]) for seed in (0, 2)] + [run("a", 0, [1.0, 2.0])]
    (axes,) = comparison_figure(recipe_comparison(runs)).axes
    full, a = axes.lines
    np.testing.assert_allclose(full.get_ydata(), [0.0, 1.0])
    np.testing.assert_allclose(a.get_ydata(), [1.0, 2.0])
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([heights.min(), heights.max()], [1 - 2**0.5, 1 + 2**0.5])
    assert axes.get_xlabel() == "step" and axes.get_ylabel() == "reward"
    assert [text.get_text() for text in axes.texts] == ["full", "a"]


def test_no_two_of_twenty_recipes_look_alike():
    names = ["full", *(f"recipe{number:02}" for number in range(20))]
    runs = [run(name, 0, [float(place), 0.0]) for place, name in enumerate(names)]
    lines = comparison_figure(recipe_comparison(runs)).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 21


@pytest.mark.parametrize("name", ["<b>&\u202e", "$_{$", "\x1b[31m", "x" * 300, "\u4e2d", "\ud83d"])
def test_hostile_names_are_shown_and_never_run(name):
    lines = [{"step": step, name: 1e99 * step} for step in (0, 1)]
    runs = [RecipeRun(recipe, 0, lines) for recipe in ("full", name)]
    page = comparison_html(recipe_comparison(runs, metric=name))
    page.encode("utf-8")
    assert "<b>" not in page and "\x1b" not in page and "\u202e" not in page
    figure = page[page.index("<svg") : page.index("</svg>") + 6]
    ElementTree.fromstring(figure)


def test_a_page_has_tables_notes_and_one_figure():
    runs = [run(name, seed, [0.0, seed]) for name in ("full", "a") for seed in (0, 1)]
    page = comparison_html(recipe_comparison(runs))
    assert page.count("<table>") == 2 and page.count("<svg") == 1
    assert "<dt>baseline</dt><dd>full</dd>" in page and "paired, 2 seeds" in page
    assert "too narrow" in page and "src=" not in page and "@import" not in page
