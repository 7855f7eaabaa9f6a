"""`run.json`: what a run says of itself is what reports and comparisons read."""

import json

import tokenweights as tw
from tokenweights.report import (
    append_metrics,
    recipe_run_from_directory,
    run_from_directory,
    write_run_json,
)


def written(config, **options):
    settings = {"trainer": "einops", "model": "org/model", "data": "data/sums.jsonl", "seed": 5}
    write_run_json(config, **settings, **options)


def test_report_and_comparison_read_it(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    config = tw.TokenWeightsConfig({"name": "low2high", "warmup_steps": 9}, metrics_file=str(path))
    written(config, settings={"batch": 128, "steps": None})
    append_metrics(path, {"step": 0, "reward": 0.5})
    run = run_from_directory(path.parent)
    assert run.title == "low2high on sums.jsonl" and "9 steps" in run.recipe
    assert run.settings["model"] == "org/model" and run.settings["seed"] == 5
    assert run.settings["batch"] == 128 and run.settings["tokenweights"] == tw.__version__
    assert {"torch", "einops", "python"} <= run.settings.keys()
    compared = recipe_run_from_directory(path.parent)
    assert (compared.recipe, compared.seed) == ("low2high", 5)


def test_it_lies_beside_the_first_file_that_is_named(tmp_path):
    recipe = tw.recipe({"name": "low2high", "layers": [3]})
    config = tw.TokenWeightsConfig(
        "low2high",
        token_records=str(tmp_path / "a/tokens.jsonl"),
        gradient_probe_file=str(tmp_path / "b/gradient.jsonl"),
        gradient_probe_steps=5,
    )
    written(config, recipe=recipe)
    assert "layer 3" in json.loads((tmp_path / "a/run.json").read_text())["recipe"]
    assert not (tmp_path / "b").exists()


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tw.TokenWeightsConfig("full"))
    assert not any(tmp_path.iterdir())
