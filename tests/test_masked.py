import pytest
import torch
from hypothesis import given
from strategies import FLOATS, scored_masks

from tokenweights import (
    TokenWeightsError,
    masked_extrema,
    masked_mean,
    masked_order,
    masked_ranks,
    masked_sum,
)
from tokenweights.masked import require_finite


@given(scored_masks())
def test_reductions_see_the_valid_values_only(case):
    scores, mask = case
    valid = scores[mask]
    torch.testing.assert_close(masked_sum(scores, mask), valid.sum())
    expected = valid.mean() if valid.numel() else valid.new_tensor(0.0)
    torch.testing.assert_close(masked_mean(scores, mask), expected)
    low, high = masked_extrema(scores, mask)
    assert low == (valid.min() if valid.numel() else torch.inf)
    assert high == (valid.max() if valid.numel() else -torch.inf)


@given(scored_masks(dtypes=FLOATS))
def test_ranks_agree_with_a_stable_python_sort(case):
    scores, mask = case
    ranks, order = masked_ranks(scores, mask), masked_order(scores, mask)
    for row in range(mask.shape[0]):
        valid = mask[row].nonzero().flatten().tolist()
        expected = sorted(valid, key=lambda place: (scores[row, place].item(), place))
        assert order[row, : len(valid)].tolist() == expected
        assert [ranks[row, place].item() for place in expected] == list(range(len(valid)))


def test_masked_tokens_get_no_gradient():
    values = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    masked_mean(values, torch.tensor([[True, False]])).backward()
    assert values.grad is not None and values.grad.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_integers_with_the_largest_value_still_rank_before_masked_tokens(dtype):
    top = torch.iinfo(dtype).max
    values = torch.tensor([[0, top, 5, top, 7]], dtype=dtype)
    mask = torch.tensor([[False, True, True, True, False]])
    assert masked_order(values, mask).tolist() == [[2, 1, 3, 0, 4]]
    assert masked_ranks(values, mask).tolist() == [[3, 1, 0, 2, 4]]


@pytest.mark.parametrize("rank", [masked_order, masked_ranks])
def test_what_has_no_order_is_refused(rank):
    with pytest.raises(TokenWeightsError, match="finite under a True mask"):
        rank(torch.tensor([[0.0, float("nan")]]), torch.tensor([[True, True]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_require_finite_names_the_place(bad):
    values = torch.tensor([[0.0, bad]])
    require_finite("f", "scores", values, torch.tensor([[True, False]]))
    with pytest.raises(TokenWeightsError, match=r"`f`: expected `scores` finite .* \(0, 1\)"):
        require_finite("f", "scores", values, torch.tensor([[True, True]]))
