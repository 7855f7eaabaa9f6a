"""Scores equal eager attention and full softmax, and weights reach every estimator's advantages."""

import copy
from types import SimpleNamespace

import pytest
import reference
import tiny
import torch
from openrlhf.models import Actor
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.kl_controller import FixedKLController
from tokenweights import TokenWeightsConfig
from tokenweights.recipes.attention import AttentionEntropy
from tokenweights.report.records import read_metrics, read_token_records
from tokenweights_lab import load_tokenizer

from tokenweights_openrlhf import TokenWeightsExperienceMaker
from tokenweights_openrlhf.config import checked_arguments
from tokenweights_openrlhf.scores import attention_scores, predictive_scores


def one_batch(policy):
    samples = tiny.rollouts(tiny.arguments(policy))
    return Experience.concat_experiences(samples, 0)


def actor(policy, packed, temperature=1.0):
    made = Actor(policy, "sdpa", "fp32", packing_samples=packed, temperature=temperature)
    return made.eval()


@pytest.mark.parametrize("row", ["deciding", "own"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_attention_entropies_equal_eager_attention(policy, packed, row):
    batch, model = one_batch(policy), actor(policy, packed)
    _, found = reference.read(policy, list(tiny.responses()), row=row)
    length = batch.action_mask.shape[1]
    read = AttentionEntropy(layers=(reference.PROBE,), alignment=row)
    with torch.no_grad(), attention_scores(model, batch.attention_mask, read, length) as scores:
        model(batch.sequences, batch.action_mask, batch.attention_mask)
    entropies = scores[reference.PROBE]
    for signals, values, mask in zip(found, entropies, batch.action_mask.bool(), strict=True):
        assert values[mask].tolist() == pytest.approx(signals["attention"], abs=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_predictive_entropies_equal_the_full_softmax(policy, packed):
    batch, model = one_batch(policy), actor(policy, packed, temperature=1.7)
    _, found = reference.read(policy, list(tiny.responses()), temperature=1.7)
    with torch.no_grad(), predictive_scores(model, batch.action_mask.shape[1]) as scores:
        log_probs = model(batch.sequences, batch.action_mask, batch.attention_mask)
    plain = model(batch.sequences, batch.action_mask, batch.attention_mask)
    assert torch.equal(log_probs, plain)  # and the hooks are gone
    entropies = scores["predictive_entropy"]
    for signals, values, mask in zip(found, entropies, batch.action_mask.bool(), strict=True):
        assert values[mask].tolist() == pytest.approx(signals["predictive"], abs=1e-5)


def maker(maker_class, args):
    nothing = (None, None, None, None)
    strategy = SimpleNamespace(args=args)
    return maker_class(*nothing, FixedKLController(0.1), strategy, load_tokenizer())


ESTIMATORS = [
    *("gae", "reinforce", "reinforce_baseline", "flash_reinforce", "rloo", "group_norm", "dr_grpo"),
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_advantages_of_every_estimator_are_weighted_and_returns_are_not(policy, estimator):
    args = tiny.arguments(policy, "--algo.advantage.estimator", estimator)
    draw = torch.Generator().manual_seed(1)
    batches = maker(RemoteExperienceMaker, args).split_rollout_samples(tiny.rollouts(args))
    for batch in batches:
        shape = batch.action_mask.shape
        batch.values, batch.kl = torch.rand(2, *shape, generator=draw)
    checked_arguments(args, TokenWeightsConfig({"name": "front20", "denominator": "all_tokens"}))
    plain = maker(RemoteExperienceMaker, args)
    weighted = maker(TokenWeightsExperienceMaker, args)
    before = plain.compute_advantages_and_returns(copy.deepcopy(batches))
    after = weighted.compute_advantages_and_returns(copy.deepcopy(batches))
    for one, other in zip(before, after, strict=True):
        mask = one.action_mask.bool()
        rank, length = mask.cumsum(-1), mask.sum(-1, keepdim=True)
        weights = (mask & (rank * 5 <= length)).float()
        assert torch.equal(other.advantages, one.advantages * weights)
        assert torch.equal(other.returns, one.returns)
        assert torch.equal(other.action_mask, one.action_mask)
    assert any(bool((made.advantages != 0).any()) for made in after)


def test_a_wider_split_gives_the_same_random_weights(policy):
    """Random rules draw by the response's number in the run, not by its place in a batch."""
    factors = []
    for size in (1, 2, 8):
        options = ("--rollout.micro_batch_size", size, "--algo.kl.init_coef", 0)
        args = tiny.arguments(policy, *options, recipe="random20")
        weighted = maker(TokenWeightsExperienceMaker, args)
        weighted.global_step = 5
        batches = weighted.split_rollout_samples(tiny.rollouts(args))
        for batch in batches:
            batch.kl = torch.zeros(batch.action_mask.shape)
        made = weighted.compute_advantages_and_returns(batches)
        factors.append([row[row != 0].tolist() for batch in made for row in batch.advantages])
    assert factors[0] == factors[1] == factors[2]


def test_records_hold_what_the_tokens_were_weighted_by(actors, policy, tmp_path):
    path = tmp_path / "tokens.jsonl"
    args = tiny.arguments(policy, "--ds.zero_stage", 3, ranks=2, packed=True)
    args.train.dynamic_batch_enable = True
    log = str(tmp_path / "metrics.jsonl")
    checked_arguments(args, TokenWeightsConfig("low2high", str(path), 2, metrics_file=log))
    statuses, _ = tiny.trained(actors, args, steps=3)
    lines = read_metrics(log)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line, status in zip(lines, statuses, strict=True):
        for name in ("reward", "policy_loss", "token_weights/weight_mean"):
            assert line[name] == status[name]
    records = list(read_token_records(path))
    assert [record.step for record in records] == [0] * 4 + [2] * 4
    assert [record.sample_id for record in records] == [0, 1, 2, 3, 32, 33, 34, 35]
    responses = list(tiny.responses())
    _, found = reference.read(policy, responses)
    advantages = reference.group_advantages(responses)
    weights = reference.soft_weights([made["attention"] for made in found], low=1.0, high=0.0)
    for row, record in enumerate(records[:4]):
        tokens, places = (
            responses[row]["observation_tokens"],
            reference.token_places(responses[row]),
        )
        assert record.token_ids == tuple(tokens[place] for place in places)
        assert record.prompt == responses[row]["prompt"]
        assert record.layer == reference.PROBE
        assert record.attention_entropy == pytest.approx(found[row]["attention"], abs=1e-5)
        assert record.weights == pytest.approx(weights[row], abs=1e-5)
        assert record.advantages == pytest.approx([float(advantages[row])] * len(places), abs=1e-5)
        assert record.log_probs == pytest.approx(found[row]["log_probs"].tolist(), abs=1e-4)


def test_lora_policies_are_scored_and_weights_of_one_are_plain(actors, policy):
    def run(made):
        options = ("--ds.lora.rank", 4, "--ds.zero_stage", 2)
        return tiny.trained(actors, tiny.arguments(policy, *options, recipe=made), steps=1)

    ((plain,), before), ((full,), after) = run(None), run("full")
    assert plain["actor_grad_norm"] == full["actor_grad_norm"] > 0
    assert all(torch.equal(before[name], after[name]) for name in before)
    # An untrained adapter changes no forward pass, so scores are those of the policy alone.
    ((adapted,), _), ((bare,), _) = (
        run("low2high"),
        tiny.trained(actors, tiny.arguments(policy, recipe="low2high")),
    )
    names = [name for name in bare if name.startswith("token_weights/")]
    assert len(names) > 5
    assert {name: adapted[name] for name in names} == pytest.approx(
        {name: bare[name] for name in names}, abs=1e-6
    )


def test_a_batch_without_a_token_of_the_policy_has_no_metrics(policy):
    args = tiny.arguments(policy, recipe="front20")
    weighted = maker(TokenWeightsExperienceMaker, args)
    batches = weighted.split_rollout_samples(tiny.rollouts(args))
    for batch in batches:
        batch.action_mask = torch.zeros_like(batch.action_mask)
        batch.kl = torch.zeros(batch.action_mask.shape)
    made = weighted.compute_advantages_and_returns(batches)
    assert weighted.metrics == {}
    assert all(bool((batch.advantages == 0).all()) for batch in made)
