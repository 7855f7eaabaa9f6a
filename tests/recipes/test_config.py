"""The options of the trainer adapters: what goes together, and what is refused."""

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

import tokenweights as tw
from tokenweights import TokenWeightsConfig, TokenWeightsError

REFUSED = [
    ({"recipe": None}, "expected `recipe` a recipe name or a dict, got None"),
    ({"recipe": "low2hihg"}, "Did you mean 'low2high'"),
    ({"recipe": {"name": "low2high", "warmup": 3}}, "Did you mean 'warmup_steps'"),
    ({"recipe": '{"name": "low2high"'}, "a name or valid JSON"),
    ({"recipe": "loss_low20"}, "loss_magnitude"),
    ({"token_records_steps": 0}, "expected `token_records_steps` >= 1, got 0"),
    ({"token_records_steps": 2.5}, "expected `token_records_steps` >= 1, got 2.5"),
    ({"token_records_steps": True}, "expected `token_records_steps` >= 1, got True"),
    ({"recipe": "random20", "token_records": "tokens.jsonl"}, "expected `token_records` None"),
    ({"token_records": "."}, "expected `token_records` a file"),
    ({"gradient_probe_steps": 0}, "expected `gradient_probe_steps` >= 1"),
    ({"gradient_probe_file": "probe.jsonl"}, "expected `gradient_probe_file` None"),
    (
        {"gradient_probe_steps": 5, "gradient_probe_file": "."},
        "expected `gradient_probe_file` a file",
    ),
    ({"gradient_probe_tolerance": 0.0}, "expected `gradient_probe_tolerance` > 0, got 0.0"),
    ({"gradient_probe_tolerance": float("nan")}, "`gradient_probe_tolerance` > 0, got nan"),
    ({"gradient_probe_tolerance": True}, "`gradient_probe_tolerance` > 0, got True"),
    ({"gradient_probe_tolerance": "small"}, "`gradient_probe_tolerance` > 0, got 'small'"),
    ({"token_records": 5}, "expected `token_records` a path, got 5"),
    ({"metrics_file": f"{__file__}/metrics.jsonl"}, "test_config.py is a file"),
    (
        {"token_records": "run.jsonl", "metrics_file": "./run.jsonl"},
        "expected `token_records` a file of its own",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_what_is_refused(changes, message):
    with pytest.raises(TokenWeightsError) as error:
        TokenWeightsConfig(**{"recipe": "low2high", **changes})
    assert message in str(error.value)


def test_a_mapping_gives_options_by_name():
    asked = {"recipe": "low2high", "token_records_steps": 7}
    assert TokenWeightsConfig.from_mapping(asked) == TokenWeightsConfig(**asked)
    with pytest.raises(TokenWeightsError, match=r"got \['record'\]. Known are recipe, token_rec"):
        TokenWeightsConfig.from_mapping({**asked, "record": "x"})


def test_the_recipe_comes_as_name_fields_or_text():
    made = tw.recipe({"name": "anchor20", "fraction": 0.4})
    for choice in (made, made.to_dict(), '{"name": "anchor20", "fraction": 0.4}'):
        assert TokenWeightsConfig(choice).token_recipe == made


def test_files_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = TokenWeightsConfig("low2high", "runs/tokens.jsonl", gradient_probe_steps=5)
    assert made.token_records == str(tmp_path / "runs" / "tokens.jsonl")
    assert made.gradient_probe_file is None


def test_a_command_line_knows_every_option():
    hints = get_type_hints(TokenWeightsConfig)
    for option in fields(TokenWeightsConfig):
        kind = option.metadata["type"]
        assert option.metadata["help"]
        assert kind in {hints[option.name], *get_args(hints[option.name])}
