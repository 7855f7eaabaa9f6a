import math

import pytest
import torch
from gradients import tiny_policy

import tokenweights as tw
from tokenweights import TokenWeightsError

TOKENS, PROBABILITY, DRAWS = 2000, 0.2, 400


def token_gradients():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, 30, generator=generator, dtype=torch.float64) + 0.1


def subset_gradient(gradients, subset):
    return gradients[subset].mean(0)


def test_random_subsets_have_the_predicted_error_and_cosine():
    gradients = token_gradients()
    full = gradients.mean(0)
    squared = float(gradients.square().sum(-1).mean())
    errors, cosines = [], []
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    for seed in range(DRAWS):
        subset = tw.bernoulli_subset(mask, probability=PROBABILITY, seed=seed)[0]
        gradient = subset_gradient(gradients, subset)
        errors.append(float((gradient - full).square().sum()))
        cosines.append(float(gradient @ full / gradient.norm() / full.norm()))
    known = {"probability": PROBABILITY, "tokens": TOKENS, "mean_squared_norm": squared}
    predicted_error = tw.expected_random_error(**known)
    predicted_cosine = tw.expected_random_cosine(**known, full_squared_norm=float(full @ full))
    # Eq. 9 leaves out -|g|^2 beside V, here 1 % of it; the rest is Monte-Carlo error.
    assert sum(errors) / DRAWS == pytest.approx(predicted_error, rel=0.05)
    spread = torch.tensor(cosines).std() / math.sqrt(DRAWS)
    assert abs(sum(cosines) / DRAWS - predicted_cosine) < 4 * spread + 0.01


def test_a_structured_subset_misses_the_prediction():
    gradients = token_gradients()
    full = gradients.mean(0)
    aligned = gradients @ full
    top = tw.top_fraction(aligned[None], torch.ones(1, TOKENS, dtype=torch.bool))[0]
    gradient = subset_gradient(gradients, top)
    squared = float(gradients.square().sum(-1).mean())
    predicted = tw.expected_random_error(
        probability=PROBABILITY, tokens=TOKENS, mean_squared_norm=squared
    )
    assert float((gradient - full).square().sum()) > 5 * predicted


@pytest.fixture(scope="module")
def policy_gradients():
    """Every token's gradient under a tiny transformer, and the mask of its batch."""
    batch = tiny_policy.Batch(rows=16, tokens=32)
    return tiny_policy.jacobian(tiny_policy.policy(), batch), batch.mask


def predicted_cosine(gradients, probability):
    full = gradients.mean(0)
    return tw.expected_random_cosine(
        probability=probability,
        tokens=len(gradients),
        mean_squared_norm=float(gradients.square().sum(-1).mean()),
        full_squared_norm=float(full @ full),
    )


def cosine(gradients, subset):
    gradient, full = subset_gradient(gradients, subset), gradients.mean(0)
    return float(gradient @ full / gradient.norm() / full.norm())


@pytest.mark.parametrize("probability", [0.2, 0.5, 0.8])
def test_random_subsets_of_a_policy_gradient_have_the_predicted_cosine(
    policy_gradients, probability
):
    gradients, mask = policy_gradients
    draws = [
        tw.bernoulli_subset(mask, probability=probability, seed=seed)[mask] for seed in range(DRAWS)
    ]
    cosines = torch.tensor([cosine(gradients, draw) for draw in draws], dtype=torch.float64)
    error = float(cosines.std()) / math.sqrt(DRAWS)
    assert 0 < error < 0.012
    assert abs(float(cosines.mean()) - predicted_cosine(gradients, probability)) < 3 * error


@pytest.mark.parametrize("selected", ["most aligned", "least aligned", "largest"])
def test_structured_subsets_of_a_policy_gradient_miss_it(policy_gradients, selected):
    gradients, _ = policy_gradients
    score = gradients @ gradients.mean(0) if "aligned" in selected else gradients.norm(dim=-1)
    order = score.argsort(descending=selected != "least aligned")
    structured = cosine(gradients, order[: round(0.2 * len(order))])
    # Beyond the spread of single random draws, 0.17, by half: no draw to be mistaken for one.
    assert abs(structured - predicted_cosine(gradients, 0.2)) > 0.25


def test_a_chance_near_zero_has_an_error_of_zero_where_nothing_varies():
    least = math.ulp(0.0)
    assert tw.expected_random_error(probability=least, tokens=1, mean_squared_norm=0.0) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: tw.expected_random_error(probability=0.0, tokens=1, mean_squared_norm=1.0),
        lambda: tw.expected_random_error(probability=0.5, tokens=0, mean_squared_norm=1.0),
        lambda: tw.expected_random_error(probability=0.5, tokens=2**2000, mean_squared_norm=1.0),
        lambda: tw.expected_random_error(probability=0.5, tokens=1, mean_squared_norm=-1.0),
        lambda: tw.expected_random_cosine(
            probability=0.5, tokens=1, mean_squared_norm=1.0, full_squared_norm=0.0
        ),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(TokenWeightsError):
        make()
