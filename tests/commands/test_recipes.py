"""`recipes`: the list, the words of one, and JSON that a configuration takes."""

import json

import pytest

import tokenweights as tw
from tokenweights.__main__ import main


def printed(capsys, *arguments):
    assert main(["recipes", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_every_recipe_has_a_line_under_its_source(capsys):
    paper, field = printed(capsys).split("\n\n")
    for part, source in ((paper, "paper"), (field, "field")):
        title, *lines = part.splitlines()
        assert source in title
        assert tuple(line.split()[0] for line in lines) == tw.recipe_names(source=source)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("full", ["-", "w = 1 for every token"]),
        ("anchor20", ["attention entropy", "w = 1 for the lowest 20% of each response, else 0"]),
        ("high2low", ["attention entropy", "w_low 0 -> 1, w_high 1 -> 0, linear, 100 steps"]),
        ("covariance_drop", ["covariance", "arXiv 2505.22617, Clip-Cov"]),
        ("second_moment_drop", ["-", "arXiv 2510.01161, Algorithm 1"]),
    ],
)
def test_a_line_says_what_is_scored_and_how_it_weighs_or_whose_it_is(name, words, capsys):
    (line,) = [line for line in printed(capsys).splitlines() if line.startswith(f"  {name} ")]
    cells = [cell.strip() for cell in line.split("  ") if cell]
    assert cells == [name, *words]


@pytest.mark.parametrize("name", ["low2high", "certainty_shaping"])
def test_one_recipe_describes_itself(name, capsys):
    assert printed(capsys, name) == tw.recipe(name).describe() + "\n"


@pytest.mark.parametrize("name", tw.recipe_names())
def test_json_is_a_configuration(name, capsys):
    assert tw.recipe(json.loads(printed(capsys, name, "--json"))) == tw.recipe(name)


def test_json_without_a_name_holds_them_all(capsys):
    values = json.loads(printed(capsys, "--json"))
    assert [tw.recipe(value) for value in values] == [*map(tw.recipe, tw.recipe_names())]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("low2hihg", "Did you mean 'low2high'?"),
        ("fipo", "every weight is 1"),
        ("low2hig", "Did you mean 'low2high'?"),
        ("anchr20", "Did you mean 'anchor20'?"),
        ('{"name": "ancor20"}', "Did you mean 'anchor20'?"),
        ("nope", "got 'nope'. `tokenweights recipes` lists them."),
        ("foo:bar", "got 'foo:bar'. `tokenweights recipes` lists them."),
        ("?\n\x1b[31m", "`tokenweights recipes` lists them."),
        ("", "got ''. `tokenweights recipes` lists them."),
        ('{"warmup_steps": 20}', "`NAME` with the name of a recipe, or with a rule, got"),
        ('{"name": ["full"]}', "with the name of a recipe, or with a rule, got"),
        ("{name: full}", "`NAME` a recipe's name or valid JSON, got '{name: full}'. Write"),
        ('{"a":' * 100_000, "a recipe's name or valid JSON, got "),
        ('{"name": "low2high", "warmup": 20}', "Did you mean 'warmup_steps'?"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_name_that_is_none_is_refused_in_one_line(name, words, options, capsys):
    assert main(["recipes", name, *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err
    assert captured.err.count("\n") == 1 and "\x1b" not in captured.err
    assert len(captured.err) < 400


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "low2high", "warmup_steps": 20},
        {"name": "loss_low20", "fraction": 0.1},
        {"rule": "top", "signal": "surprisal"},
    ],
)
def test_the_fields_of_a_recipe_are_described_as_inspect_takes_them(fields, capsys):
    made = tw.recipe(fields)
    assert printed(capsys, json.dumps(fields)) == made.describe() + "\n"
    assert tw.recipe(json.loads(printed(capsys, json.dumps(fields), "--json"))) == made
