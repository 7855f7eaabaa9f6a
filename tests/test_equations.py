"""The paper's equations, one test each, against numbers worked by hand."""

import math

import pytest
import torch

import tokenweights as tw
from tokenweights import Endpoints

LOG2 = math.log(2)
ALL = torch.ones(1, 4, dtype=torch.bool)
LOSS = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
# One query that sees four keys, in two heads; their average is 1/2, 1/4, 1/8, 1/8.
HEADS = torch.tensor([[[[0.75, 0.25, 0.0, 0.0]], [[0.25, 0.25, 0.25, 0.25]]]])


def entropy(kind, **options):
    return tw.attention_entropy_from_weights(HEADS, kind=kind, **options).item()


def test_equation_1_full_token_loss():
    assert tw.weighted_token_mean(LOSS, ALL).item() == 2.5


def test_equation_2_raw_and_normalized_attention_entropy():
    assert entropy("raw") == pytest.approx(1.75 * LOG2)
    assert entropy("normalized") == pytest.approx(1.75 / 2)


def test_equation_3_weighted_objective():
    weights = torch.tensor([[1.0, 0.0, 0.5, 0.0]])
    loss = tw.weighted_token_mean(LOSS, ALL, weights, denominator="weight_sum")
    assert loss.item() == pytest.approx(2.5 / 1.5)


def geometry():
    subset, full = [torch.tensor([3.0, 0.0])], [torch.tensor([3.0, 4.0])]
    return tw.gradient_geometry(subset, full)


def test_equation_4_norm_ratio():
    assert geometry().norm_ratio == pytest.approx(3 / 5)


def test_equation_5_cosine():
    assert geometry().cosine == pytest.approx(9 / 15)


def test_equation_6_projection_ratio():
    assert geometry().projection_ratio == pytest.approx(9 / 25)


def test_equation_7_all_token_normalization():
    weights = torch.tensor([[1.0, 0.0, 0.5, 0.0]])
    assert tw.weighted_token_mean(LOSS, ALL, weights).item() == pytest.approx(2.5 / 4)


def test_equation_8_a_fixed_size_random_subset_is_unbiased():
    mask = ALL.expand(6000, 4)
    subset = tw.random_fraction(mask, fraction=0.5, seed=0)
    means = (LOSS * subset).sum(-1) / 2
    assert means.mean().item() == pytest.approx(2.5, abs=0.03)


def test_equation_9_error_of_a_random_subset():
    error = tw.expected_random_error(probability=0.2, tokens=1000, mean_squared_norm=50.0)
    assert error == pytest.approx(0.8 / 200 * 50)


def test_equation_10_cosine_of_a_random_subset():
    cosine = tw.expected_random_cosine(
        probability=0.2, tokens=1000, mean_squared_norm=50.0, full_squared_norm=0.2
    )
    assert cosine == pytest.approx(1 / math.sqrt(2))


def test_equation_11_averaged_weights_sum_to_one():
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    mass = tw.attention_statistics(query, key, kinds=("row_mass",)).row_mass
    torch.testing.assert_close(mass, torch.ones(1, 5))


def test_equation_12_raw_entropy():
    # Scores log 2, 0, 0 in one head: weights 1/2, 1/4, 1/4.
    key = torch.tensor([[[[LOG2], [0.0], [0.0]]]])
    query = torch.ones(1, 1, 1, 1)
    raw = tw.attention_entropy(query, key, kind="raw", scale=1.0)
    assert raw.item() == pytest.approx(1.5 * LOG2)


def test_equation_13_normalized_entropy():
    key = torch.tensor([[[[LOG2], [0.0], [0.0]]]])
    normalized = tw.attention_entropy(torch.ones(1, 1, 1, 1), key, scale=1.0)
    assert normalized.item() == pytest.approx(1.5 * LOG2 / math.log(3))


def test_equation_14_topk_entropy():
    # The two largest weights, 1/2 and 1/4, become 2/3 and 1/3.
    expected = math.log(3) - 2 / 3 * LOG2
    assert entropy("topk", top_k=2) == pytest.approx(expected)


def test_equation_15_fixed_position_entropy():
    # The first three weights become 4/7, 2/7 and 1/7.
    expected = math.log(7) - (4 * math.log(4) + 2 * LOG2) / 7
    assert entropy("fixed", fixed_k=3) == pytest.approx(expected)


def test_equation_16_anchors_and_explorers():
    scores = torch.tensor([[0.3, 0.1, 0.9, 0.5]])
    assert tw.bottom_fraction(scores, ALL, fraction=0.25).tolist() == [[False, True, False, False]]
    assert tw.top_fraction(scores, ALL, fraction=0.5).tolist() == [[False, False, True, True]]


def test_equation_17_hard_mask_normalized_by_its_sum():
    anchors = torch.tensor([[False, True, False, True]])
    weights = tw.subset_weights(anchors)
    loss = tw.weighted_token_mean(LOSS, ALL, weights, denominator="weight_sum")
    assert loss.item() == 3.0


def test_equation_18_front_and_back():
    mask = torch.ones(1, 10, dtype=torch.bool)
    assert tw.front_fraction(mask, fraction=0.2)[0].nonzero().flatten().tolist() == [0, 1]
    assert tw.back_fraction(mask, fraction=0.2)[0].nonzero().flatten().tolist() == [8, 9]


def test_equation_19_predictive_entropy():
    logits = torch.tensor([[[LOG2, 0.0, 0.0]]])
    assert tw.predictive_entropy(logits).item() == pytest.approx(1.5 * LOG2)


def test_equation_20_is_equation_2():
    assert entropy("normalized") == pytest.approx(entropy("raw") / math.log(4))


def test_equation_21_predictive_entropy_controls():
    scores = torch.tensor([[0.3, 0.1, 0.9, 0.5, 0.2]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    low = tw.recipe("predictive_low20").token_weights(scores, mask, step=0)
    high = tw.recipe("predictive_high20").token_weights(scores, mask, step=0)
    assert low.tolist() == [[0, 1, 0, 0, 0]] and high.tolist() == [[0, 0, 1, 0, 0]]


def test_equation_22_quadrants():
    predictive, attention = (
        torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        torch.tensor([[1.0, 4.0, 2.0, 3.0]]),
    )
    # LowPred LowAttn, LowPred HighAttn, HighPred LowAttn, HighPred HighAttn.
    assert tw.median_quadrants(predictive, attention, ALL).tolist() == [[0, 2, 1, 3]]


def test_equation_23_loss_magnitude_controls():
    magnitude = tw.loss_magnitude(torch.tensor([[-5.0, 1.0, 0.5, 2.0, -0.1]]))
    mask = torch.ones(1, 5, dtype=torch.bool)
    low = tw.recipe("loss_low20").token_weights(magnitude, mask, step=0)
    high = tw.recipe("loss_high20").token_weights(magnitude, mask, step=0)
    assert low.tolist() == [[0, 0, 0, 0, 1]] and high.tolist() == [[1, 0, 0, 0, 0]]


SUBSET = torch.tensor([[0.0, 1.0, 0.0, 1.0]])


def test_equation_24_selected_token_mean():
    loss = tw.weighted_token_mean(LOSS, ALL, SUBSET, denominator="selected_tokens")
    assert loss.item() == 6.0 / 2


def test_equation_25_all_token_mean():
    loss = tw.weighted_token_mean(LOSS, ALL, SUBSET, denominator="all_tokens")
    assert loss.item() == 6.0 / 4


# exp(H) is 1, 2, 4 and 1: softmax scores 1/8, 2/8, 4/8, 1/8.
SCORES = torch.tensor([[0.0, LOG2, 2 * LOG2, 0.0]])


def test_equation_26_softmax_over_the_rollout_batch():
    extrema = tw.score_extrema(SCORES, ALL)
    # With c the largest score, the sum is (1 + 2 + 4 + 1) / 4.
    assert tw.softmax_partition(SCORES, ALL, extrema).item() == pytest.approx(2.0)


@pytest.mark.parametrize("form", ["stable", "literal"])
def test_equation_27_rescaled_scores(form):
    abar = tw.endpoint_weights(SCORES, ALL, Endpoints(0.0, 1.0), form=form)
    torch.testing.assert_close(abar, torch.tensor([[0.0, 1 / 3, 1.0, 0.0]]))


def test_equation_28_interpolated_weights():
    weights = tw.endpoint_weights(SCORES, ALL, Endpoints(low=2.0, high=0.5))
    torch.testing.assert_close(weights, torch.tensor([[2.0, 1.5, 0.5, 2.0]]))


def test_equation_29_low_endpoint():
    assert [tw.low_to_high(50)(step).low for step in (0, 10, 50, 80)] == [1.0, 0.8, 0.0, 0.0]


def test_equation_30_high_endpoint():
    assert [tw.low_to_high(50)(step).high for step in (0, 10, 50, 80)] == [0.0, 0.2, 1.0, 1.0]
