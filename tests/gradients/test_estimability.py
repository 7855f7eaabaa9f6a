import math

import pytest
import torch

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


@pytest.mark.parametrize(
    "make",
    [
        lambda: tw.expected_random_error(probability=0.0, tokens=1, mean_squared_norm=1.0),
        lambda: tw.expected_random_error(probability=0.5, tokens=0, mean_squared_norm=1.0),
        lambda: tw.expected_random_error(probability=0.5, tokens=1, mean_squared_norm=-1.0),
        lambda: tw.expected_random_cosine(
            probability=0.5, tokens=1, mean_squared_norm=1.0, full_squared_norm=0.0
        ),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(TokenWeightsError):
        make()
