"""Weights of one give plain OpenRLHF bit for bit, and plain OpenRLHF is what the formulas say."""

import pytest
import reference
import tiny
from layouts import LAYOUTS

SAME = ("policy_loss", "actor_grad_norm", "ppo_kl", "ppo_clip_ratio", "reward", "return")


def differing(plain, weighted):
    """Largest difference of the parameters."""
    return max(float((plain[name] - weighted[name]).abs().max()) for name in plain)


@pytest.mark.parametrize(("options", "settings"), LAYOUTS)
def test_weights_of_one_are_plain_openrlhf(actors, policy, options, settings):
    def run(recipe):
        arguments = tiny.arguments(policy, *options, recipe=recipe, **settings)
        return tiny.trained(actors, arguments, steps=2)

    (plain, before), (weighted, after) = run(None), run("full")
    for one, other in zip(plain, weighted, strict=True):
        assert [one[name] for name in SAME] == [other[name] for name in SAME]
        assert other["token_weights/weight_mean"] == 1
    assert differing(before, after) == 0


@pytest.mark.parametrize(("options", "settings"), LAYOUTS)
def test_plain_openrlhf_steps_along_the_gradient_of_the_formulas(actors, policy, options, settings):
    (status,), after = tiny.trained(actors, tiny.arguments(policy, *options, **settings))
    responses = list(tiny.responses())
    model, found = reference.read(policy, responses)
    ones = [[1.0] * len(signals["log_probs"]) for signals in found]
    gradient, norm = reference.gradient(model, found, responses, ones)
    assert status["actor_grad_norm"] == pytest.approx(norm, rel=1e-5)
    taken = reference.steps_taken(reference.load(policy).state_dict(), after)
    assert reference.largest_difference(taken, gradient) < 2e-5
    assert norm > 0.5


def test_dynamic_batches_below_zero_3_are_wrong_without_token_weights(actors, policy):
    """The reason why the adapter refuses them."""
    options = ("--ds.zero_stage", 2, "--train.dynamic_batch_enable")
    (status,), _ = tiny.trained(actors, tiny.arguments(policy, *options, packed=True))
    responses = list(tiny.responses())
    model, found = reference.read(policy, responses)
    ones = [[1.0] * len(signals["log_probs"]) for signals in found]
    _, norm = reference.gradient(model, found, responses, ones)
    assert abs(status["actor_grad_norm"] / norm - 1) > 0.1
