"""Every named recipe trains with the weights it says, or is refused by name; and so do your own."""

import json
import sys

import pytest
import ray
import reference
import tiny
import tokenweights as tw
import torch
from openrlhf.trainer.ray.launcher import ReferenceModelActor
from openrlhf.utils import get_strategy
from tokenweights import TokenWeightsConfig, TokenWeightsError

from tokenweights_openrlhf.config import checked_arguments
from tokenweights_openrlhf.train import main

# OpenRLHF asks its engines for log-probabilities, and multiplies no token by anything but 1.
SAMPLED = (
    *("--algo.advantage.is_correction_level", "token"),
    *("--algo.advantage.is_correction_mode", "clip"),
    *("--algo.advantage.is_correction_threshold", 1, 1),
)
# What a named recipe needs beyond the plainest settings; all others run with these.
SETTINGS = {
    "sampler_ratio_truncated": SAMPLED,
    "sampler_ratio_band": SAMPLED,
    "second_moment_drop": SAMPLED,
}
LAYERS = {"low2high_layer8": 8, "low2high_layer20": 20, "low2high_layer31": 31}
# What OpenRLHF cannot serve under any settings, and who reads it.
REFUSED = {
    "loss_low20": "a signal other than loss_magnitude",
    "loss_high20": "a signal other than loss_magnitude",
    "certainty_shaping": "whose 'response_certainty' reads `self_certainty`",
}
SERVED = [name for name in tw.recipe_names() if name not in REFUSED]
# Rules over the whole rollout batch, with bounds that a tiny policy reaches.
BATCH_SCOPE = [
    {"name": "predictive_high20_batch"},
    {"name": "surprisal_boost10_damp10", "below": 100.0},
    {"name": "covariance_drop", "low": 0.0, "fraction": 0.2},
]
RANKS = [
    pytest.param((), {"ranks": 1}, id="1"),
    pytest.param(("--rollout.micro_batch_size", 4), {"ranks": 2}, id="2"),
    pytest.param(
        ("--ds.zero_stage", 3, "--train.dynamic_batch_enable"),
        {"ranks": 2, "packed": True},
        id="2-zero3-packed-dynamic",
    ),
]
MODULE = """
from dataclasses import dataclass


@dataclass(frozen=True)
class Doubt:
    columns = ("log_probs", "predictive_entropy")

    def __call__(self, batch):
        return (-batch.log_probs - batch.predictive_entropy).clamp(min=0)


@dataclass(frozen=True)
class Doubted:
    gamma: float = 0.3

    def __call__(self, scores, batch, *, step, group=None):
        return 1 + self.gamma * scores
"""


@pytest.fixture(scope="module")
def deep_policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep")
    tiny.save_policy(folder, layers=32)
    return str(folder)


@pytest.fixture
def rules(tmp_path, monkeypatch):
    """A module of a user's, which this process can import and Ray's workers cannot."""
    (tmp_path / "openrlhf_rules.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import openrlhf_rules

    yield openrlhf_rules
    del sys.modules["openrlhf_rules"]


def padded(rows):
    rows = [torch.as_tensor(row).detach().double() for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def by_hand(found, responses, layer):
    """The rollout batch of the first step, of plain transformers and of what the rollout says."""
    places = [reference.token_places(response) for response in responses]
    rows = torch.arange(len(responses))
    sampled = responses[0]["rollout_log_probs"] is not None
    columns = {
        "token_ids": [
            [response["observation_tokens"][place] for place in own]
            for response, own in zip(responses, places, strict=True)
        ],
        "log_probs": [signals["log_probs"] for signals in found],
        "predictive_entropy": [signals["predictive"] for signals in found],
        "sampler_log_probs": [
            [response["rollout_log_probs"][place] for place in own] if sampled else []
            for response, own in zip(responses, places, strict=True)
        ],
    }
    columns = {name: padded(values) for name, values in columns.items()}
    if not sampled:
        del columns["sampler_log_probs"]
    return tw.RolloutBatch(
        mask=padded([[1] * len(own) for own in places]).bool(),
        sample_ids=rows,
        prompt_ids=rows // tiny.SAMPLES,
        advantages=reference.group_advantages(responses)[:, None],
        rewards=torch.tensor([response["reward"] for response in responses]),
        attention={
            layer: padded([signals["attention"] for signals in found]),
            f"{layer}_distance_10": padded(
                [
                    reference.backward_distances(signals["maps"][layer], own)
                    for signals, own in zip(found, places, strict=True)
                ]
            ),
            f"{layer}_received_10_50": padded(
                [
                    reference.future_influences(signals["maps"][layer], own)
                    for signals, own in zip(found, places, strict=True)
                ]
            ),
        },
        **(columns | {"token_ids": columns["token_ids"].long()}),
    )


def check(actors, policy, recipe, *options, layer=reference.PROBE, steps=1, **settings):
    """Trains, and compares the first step's weights and gradient with those made by hand."""
    args = tiny.arguments(policy, *options, recipe=recipe, **settings)
    statuses, after = tiny.trained(actors, args, steps=steps)
    made = args.tokenweights.token_recipe
    if made.entropy is None:
        made = made.placed(3)
    responses = list(tiny.responses(sampled=args.algo.advantage.is_correction_level != "off"))
    model, found = reference.read(policy, responses, layer=layer)
    rollout = made.weighted(by_hand(found, responses, layer), step=0)
    metrics = {f"token_weights/{name}": value for name, value in rollout.metrics.items()}
    assert {name: statuses[0][name] for name in metrics} == pytest.approx(
        metrics, rel=1e-4, abs=1e-4
    )
    weights = [
        row[: len(signals["predictive"])].tolist()
        for row, signals in zip(rollout.weights, found, strict=True)
    ]
    gradient, norm = reference.gradient(
        model, found, responses, weights, denominator=made.denominator
    )
    assert statuses[0]["actor_grad_norm"] == pytest.approx(norm, rel=1e-4, abs=1e-6)
    if steps == 1:
        taken = reference.steps_taken(reference.load(policy).state_dict(), after)
        assert reference.largest_difference(taken, gradient) < 5e-5
    return statuses, rollout


def test_the_tables_name_every_recipe():
    assert {*SETTINGS, *LAYERS, *REFUSED} <= set(tw.recipe_names())
    assert not {*SETTINGS, *LAYERS} & {*REFUSED}


@pytest.mark.parametrize("name", SERVED)
def test_a_named_recipe_trains_with_the_weights_it_says(actors, policy, deep_policy, name):
    layer = LAYERS.get(name, reference.PROBE)
    chosen = deep_policy if name in LAYERS else policy
    options = SETTINGS.get(name, ())
    statuses, _ = check(actors, chosen, name, *options, layer=layer, steps=2)
    assert len(statuses) == 2
    assert all(status["token_weights/weight_mean"] >= 0 for status in statuses)


@pytest.mark.parametrize("name", REFUSED)
def test_a_recipe_that_openrlhf_cannot_serve_is_refused(name):
    with pytest.raises(TokenWeightsError) as error:
        checked_arguments(tiny.parsed(*SAMPLED), TokenWeightsConfig(name))
    assert REFUSED[name] in str(error.value)


TWICE = [
    ((), "level` 'token', got 'off'"),
    (("--algo.advantage.is_correction_level", "seq"), "level` 'token', got 'seq'"),
    (SAMPLED[:2], "mode` 'clip', got 'mask'"),
    (SAMPLED[:4], r"threshold` \[1, 1\], got \[0.5, 5.0\]"),
    ((*SAMPLED[:4], "--algo.advantage.is_correction_threshold", 1), r"threshold` \[1, 1\], got"),
]


@pytest.mark.parametrize("name", ["sampler_ratio_truncated", "sampler_ratio_band"])
@pytest.mark.parametrize(("options", "message"), TWICE, ids=str)
def test_the_ratio_to_the_sampler_is_not_corrected_twice(name, options, message):
    with pytest.raises(TokenWeightsError, match=f"is_correction_{message}.*both multiply"):
        checked_arguments(tiny.parsed(*options), TokenWeightsConfig(name))
    checked_arguments(tiny.parsed(*SAMPLED), TokenWeightsConfig(name))


def test_the_sampler_is_a_column_with_a_correction():
    """Whichever it is, for a recipe that does not correct."""
    config = TokenWeightsConfig("second_moment_drop")
    with pytest.raises(TokenWeightsError, match="reads `sampler_log_probs`"):
        checked_arguments(tiny.parsed(), config)
    checked_arguments(tiny.parsed("--algo.advantage.is_correction_level", "seq"), config)


def test_a_clip_to_one_corrects_nothing(actors, policy):
    """So that the recipe's own correction, in the runs above, is the only one."""
    (plain,), before = tiny.trained(actors, tiny.arguments(policy, recipe="full"))
    (sampled,), after = tiny.trained(actors, tiny.arguments(policy, *SAMPLED, recipe="full"))
    assert plain["actor_grad_norm"] == sampled["actor_grad_norm"]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("recipe", BATCH_SCOPE, ids=lambda recipe: recipe["name"])
@pytest.mark.parametrize(("options", "settings"), RANKS)
def test_a_batch_has_the_same_weights_on_any_ranks(actors, policy, recipe, options, settings):
    _, rollout = check(actors, policy, recipe, *options, **settings)
    assert len(rollout.weights[rollout.weights > 0].unique()) > 1 or rollout.weights.min() == 0


def test_attention_and_predictive_entropy_are_read_in_one_pass(actors, policy):
    both = {"kind": "mean_of", "signals": ["attention_entropy", "predictive_entropy"]}
    choice = {"name": "both", "signal": both, "rule": {"kind": "bottom", "scope": "prompt"}}
    for settings in ({"ranks": 1}, {"ranks": 2, "packed": True}):
        check(actors, policy, choice, **settings)


def test_layers_are_merged_on_the_driver(actors, policy):
    """A column for each layer, counted from either end."""
    signal = {"kind": "attention_entropy", "layers": [0, -2], "layer_reduction": "rank_mean"}
    choice = {"name": "ranks", "signal": signal, "rule": "bottom"}
    args = tiny.arguments(policy, recipe=choice, ranks=2, packed=True)
    (status,), _ = tiny.trained(actors, args)
    responses, ranks = list(tiny.responses()), []
    for layer in (0, 1):
        _, found = reference.read(policy, responses, layer=layer)
        entropies = [torch.tensor(signals["attention"]) for signals in found]
        ranks.append([row.argsort().argsort() / max(len(row) - 1, 1) for row in entropies])
    rows = [(one + other).tolist() for one, other in zip(*ranks, strict=True)]
    model, found = reference.read(policy, responses)
    _, norm = reference.gradient(model, found, responses, reference.lowest_fifth(rows))
    assert status["actor_grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_the_reference_is_a_column_with_the_kl_loss(actors, policy):
    signal, rule = {"kind": "reference_divergence"}, {"kind": "top", "scope": "batch"}
    config = TokenWeightsConfig({"name": "near", "signal": signal, "rule": rule})
    for options in ((), ("--algo.kl.use_loss", "--algo.kl.init_coef", 0)):
        with pytest.raises(TokenWeightsError, match="'reference_divergence' reads `reference_log"):
            checked_arguments(tiny.parsed(*options), config)
    args = tiny.arguments(policy, "--algo.kl.use_loss", "--algo.kl.init_coef", 1e-3)
    checked_arguments(args, config)
    group = tiny.actor_group(ReferenceModelActor, 1, 1)
    ray.get(group.async_init_model_from_pretrained(get_strategy(args), policy))
    kept = []

    class Keeping(tiny.WeightedTrainer):
        def train_step(self, *arguments):
            made = self.experience_maker._rollout_batch
            self.experience_maker._rollout_batch = lambda *a: kept.append(made(*a)) or kept[-1]
            return super().train_step(*arguments)

    tiny.trained(actors, args, trainer_class=Keeping, reference=group)
    (batch,) = kept
    _, found = reference.read(policy, list(tiny.responses()))
    for signals, row, mask in zip(found, batch.reference_log_probs, batch.mask, strict=True):
        assert row[mask].tolist() == pytest.approx(signals["log_probs"].tolist(), abs=1e-4)
    # An adapter fills what a recipe asks for, and no more.
    assert batch.rewards is batch.predictive_entropy is batch.attention is None


def test_a_signal_and_a_rule_of_a_users_own_train(actors, policy, rules):
    made = tw.Recipe(name="doubted", signal=rules.Doubt(), rule=rules.Doubted(0.5))
    text = json.dumps(
        {
            "name": "doubted",
            "signal": "openrlhf_rules:Doubt",
            "rule": {"kind": "openrlhf_rules:Doubted", "gamma": 0.5},
        }
    )
    assert TokenWeightsConfig(text).token_recipe == made
    results = [check(actors, policy, choice) for choice in (made, text)]
    (by_object, rollout), (by_text, _) = results
    assert by_object[0]["actor_grad_norm"] == by_text[0]["actor_grad_norm"]
    assert rollout.weights.max() > 1.1
    # All that the policy's workers got is what they read.
    (worker,) = actors(tiny.WeightedActor, 1, 1)._actor_handlers
    assert not ray.get(worker.__ray_call__.remote(lambda _: "openrlhf_rules" in sys.modules))


def test_what_text_cannot_say_stays_an_object(policy, rules):
    class Stateful(rules.Doubted):
        pass

    signal = rules.Doubt()
    made = tw.Recipe(name="local", signal=signal, rule=Stateful(0.5))
    assert tiny.arguments(policy, recipe=made).tokenweights.token_recipe.rule is made.rule


MISSPELT = [
    ("openrlhf_rules:Doubtd", "Did you mean 'Doubted'"),
    ("openrlhf_rule:Doubted", "No module named 'openrlhf_rule'"),
]


@pytest.mark.parametrize(("path", "message"), MISSPELT)
def test_a_misspelt_path_is_refused_before_ray_starts(rules, path, message, capsys):
    choice = json.dumps({"signal": "openrlhf_rules:Doubt", "rule": path})
    with pytest.raises(SystemExit) as stop:
        main(["--tokenweights.recipe", choice])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
