"""What cannot be right is refused by name, before Ray starts."""

import pytest
import tiny
from tokenweights import TokenWeightsConfig, TokenWeightsError
from tokenweights.recipes import versions

from tokenweights_openrlhf.config import checked_arguments
from tokenweights_openrlhf.train import main

pytestmark = pytest.mark.versions

GSPO = ("--actor.policy_loss_type", "gspo")
MEAN_OF_MEANS = ("--actor.loss_agg_mode", "seq-mean-token-mean")
DYNAMIC = ("--train.dynamic_batch_enable", "--ds.zero_stage")
REFUSED = [
    ("full", GSPO, "`--actor.policy_loss_type` 'ppo', got 'gspo'"),
    ("anchor20", MEAN_OF_MEANS, "divides by selected_tokens"),
    ("low2high", (*DYNAMIC, 2), "`--ds.zero_stage` 3, got 2. OpenRLHF's gradient with --train.dyn"),
    ("full", (*DYNAMIC, 1), "`--ds.zero_stage` 3, got 1. OpenRLHF's gradient with --train.dynamic"),
    ("low2high", ("--ds.tensor_parallel_size", 2), "`--ds.tensor_parallel_size` 1, got 2"),
    ("predictive_low20", ("--ds.tensor_parallel_size", 2), "`--ds.tensor_parallel_size` 1"),
    ("low2high", ("--data.max_images_per_prompt", 1), "`--data.max_images_per_prompt` 0, got 1"),
    ("entropy_bonus", ("--data.max_images_per_prompt", 1), "`--data.max_images_per_prompt` 0"),
]


@pytest.mark.parametrize(("recipe", "options", "message"), REFUSED, ids=str)
def test_options_of_openrlhf_are_refused(recipe, options, message):
    with pytest.raises(TokenWeightsError) as error:
        checked_arguments(tiny.parsed(*options), TokenWeightsConfig(recipe))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        ("--ds.param_dtype", "fp16"),
        ("--ds.ring_attn_size", 2),
        ("--actor.gradient_checkpointing_reentrant",),
    ],
    ids=str,
)
def test_options_that_the_gradient_probe_does_not_know_are_refused(options):
    config = TokenWeightsConfig("low2high", gradient_probe_steps=5)
    with pytest.raises(TokenWeightsError, match=f"`{options[0]}`.*leave out gradient_probe_steps"):
        checked_arguments(tiny.parsed(*options), config)
    checked_arguments(tiny.parsed(*options), TokenWeightsConfig("low2high"))


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("low2high", MEAN_OF_MEANS),
        ("low2high", (*DYNAMIC, 3)),
        ("random20", ("--ds.tensor_parallel_size", 2)),
        ("probability_weighted", ("--ds.tensor_parallel_size", 2)),
        ("low2high", ("--actor.dual_clip", 3)),
    ],
    ids=str,
)
def test_these_are_not(recipe, options):
    config = TokenWeightsConfig(recipe)
    assert checked_arguments(tiny.parsed(*options), config).tokenweights is config


COMMANDS = [
    ((), "expected `recipe` a recipe name or a dict, got None"),
    (("--tokenweights.recipe", "low2hihg"), "Did you mean 'low2high'"),
    (("--tokenweights.recipe", "low2high", *GSPO), "`--actor.policy_loss_type` 'ppo'"),
    (("--tokenweights.recipe", "low2high", "--tokenweights.recipes", "x"), "unrecognized"),
    (("--tokenweights.recipe", "low2high", "--no.such.option", "1"), "unrecognized arguments"),
    (("--tokenweights.token_records_steps", "often"), "invalid int value"),
]


@pytest.mark.parametrize(("options", "message"), COMMANDS, ids=str)
def test_the_command_refuses_with_one_line_and_starts_nothing(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, options)))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_another_openrlhf_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(versions, "version", lambda package: {"openrlhf": "0.12.1"}[package])
    with pytest.raises(SystemExit):
        main([])
    assert "`openrlhf` >=0.11.2,<0.12, got 0.12.1" in capsys.readouterr().err


def test_help_lists_the_options_of_both(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--tokenweights.token_records_steps" in printed
    assert "--algo.advantage.estimator" in printed


def test_a_layer_that_the_policy_does_not_have_is_refused(actors, policy):
    recipe = {"name": "low2high", "layers": [3]}
    with pytest.raises(Exception, match=r"among the attention layers \[0, 1, 2\]"):
        tiny.trained(actors, tiny.arguments(policy, recipe=recipe))
