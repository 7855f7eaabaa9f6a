"""The fast engine against the transformers model: samples, what is read of them, gradients."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import tokenweights as tw

lab = pytest.importorskip("tokenweights_lab")

FOLDER = Path(__file__).parents[2] / "integrations" / "loop"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"loop_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fast, engine = loaded("fast"), loaded("engine")
SAMPLES = 3


@pytest.fixture(scope="module")
def model():
    return lab.load_policy()


@pytest.fixture(scope="module")
def policy(model):
    return fast.policy_of(model)


def prompts(count, split="train"):
    tokenizer = lab.load_tokenizer()
    return [tokenizer(problem.prompt).input_ids for problem in lab.problems(split, count)]


def rollout_of(policy, *, seed=0, longest=81, **options):
    generator = torch.Generator().manual_seed(seed)
    return fast.sampled(
        policy, prompts(4), samples=SAMPLES, longest=longest, generator=generator, **options
    )


@pytest.fixture(scope="module")
def rollout(policy):
    return rollout_of(policy, layers=range(4), entropy=True)


def responses_of(rollout):
    """The rollout as the responses that the plain engine reads."""
    ids, real = (each.repeat_interleave(SAMPLES, 0) for each in (rollout.prompts, rollout.real))
    ids, real = torch.cat([ids, rollout.tokens], 1), torch.cat([real, rollout.mask], 1)
    return engine.Responses(ids, real, rollout.prompts.shape[1], [])


def test_what_the_sampler_reads_is_what_the_model_says(model, rollout):
    recipe = tw.recipe({"name": "low2high", "layers": (0, 1, 2, 3)}).on_model(model)
    expected = engine.columns(model, responses_of(rollout), recipe)
    found = {"log_probs": rollout.log_probs, "predictive_entropy": rollout.predictive_entropy}
    pairs = [(found[name], expected[name]) for name in found]
    pairs += [(rollout.attention[layer], expected["attention"][layer]) for layer in range(4)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours[rollout.mask], theirs[rollout.mask], atol=1e-5, rtol=1e-5)


def test_the_pass_with_a_graph_gives_the_same_log_probs(policy, rollout):
    log_probs = fast.response_log_probs(policy, rollout)[rollout.mask]
    torch.testing.assert_close(log_probs, rollout.log_probs[rollout.mask], atol=1e-5, rtol=1e-5)


def test_the_likeliest_tokens_are_those_of_generate(model, policy):
    asked = [problem.prompt for problem in lab.problems("train", 4)]
    expected = lab.completions(model, lab.load_tokenizer(), asked, temperature=0.0)
    rollout = rollout_of(policy, top_p=1e-9)
    texts = lab.load_tokenizer().batch_decode(rollout.tokens, skip_special_tokens=True)
    assert texts == [row[0] for row in expected for _ in range(SAMPLES)]


def test_a_row_does_not_depend_on_the_others(policy, rollout):
    tokenizer = lab.load_tokenizer()
    assert len(tokenizer) == len(policy.embedding)
    lengths = rollout.mask.sum(-1)
    assert len(lengths.unique()) > 2  # rows ended at different steps, and were dropped
    ends = rollout.tokens[torch.arange(len(lengths)), lengths - 1]
    assert ((ends == fast.END) | (lengths == 81)).all()
    assert not (rollout.tokens[~rollout.mask] != fast.PAD).any()


def test_draws_follow_the_nucleus():
    shares = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).expand(20_000, -1)
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(fast.nucleus_draws(shares, draws, 0.7), minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.625, 0.375, 0, 0]), atol=0.01, rtol=0)
    counts = torch.bincount(fast.nucleus_draws(shares, draws, 1.0), minlength=4) / 20_000
    torch.testing.assert_close(counts, shares[0], atol=0.01, rtol=0)


def test_the_gradient_is_that_of_the_model(model, rollout):
    policy = fast.policy_of(model)
    weights = torch.rand(rollout.mask.shape, generator=torch.Generator().manual_seed(1))
    advantages = torch.tensor([1.0, -0.5, -0.5] + [0.0] * 3 + [-1.0, 0.5, 0.5] * 2)[:, None]
    fast.accumulate_gradient(policy, rollout, advantages * weights)
    log_probs, _ = engine.log_probs_of(model, responses_of(rollout))
    losses = -(log_probs - log_probs.detach()).exp() * advantages * weights
    loss = losses[rollout.mask].sum() / rollout.mask.sum()
    names = [name for name, _ in model.named_parameters()]
    expected = torch.autograd.grad(loss, list(model.parameters()))
    gradients = dict(zip(names, expected, strict=True))
    # Gradients lie where the weights lie: written into a model, they have the model's names.
    layers = tuple(
        fast.Layer(*(getattr(layer, item.name).grad for item in fast.fields(layer)))
        for layer in policy.layers
    )
    found = fast.Policy(policy.sizes, policy.embedding.grad, layers, policy.norm.grad)
    holder = lab.load_policy()
    fast.write_policy(found, holder)
    for name, value in holder.named_parameters():
        scale = gradients[name].abs().max()
        torch.testing.assert_close(value, gradients[name], atol=float(1e-5 * scale), rtol=1e-4)


def test_weights_survive_the_way_there_and_back(model):
    holder = lab.load_policy()
    with torch.no_grad():
        for parameter in holder.parameters():
            parameter.zero_()
    fast.write_policy(fast.policy_of(model), holder)
    pairs = zip(holder.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
