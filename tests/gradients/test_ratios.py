import math

import pytest
import torch
from gradients import tiny_policy
from hypothesis import given
from hypothesis import strategies as st

import tokenweights as tw
from tokenweights import TokenWeightsError


def alignment():
    batch, model = tiny_policy.Batch(), tiny_policy.policy()
    found = tw.token_alignment(lambda: batch.loss(model), model, mask=batch.mask, method="forward")
    return batch, found


BATCH, FOUND = alignment()


def test_deciles_agree_with_one_backward_pass_each():
    model = tiny_policy.policy()
    gradients = tw.group_gradients(
        BATCH.loss(model), BATCH.deciles, model.parameters(), mask=BATCH.mask
    )
    expected = [tw.gradient_geometry(g, gradients.total).projection_ratio for g in gradients.groups]
    ratios = tw.group_projection_ratios(FOUND.projection_ratio, BATCH.deciles, BATCH.mask, count=10)
    torch.testing.assert_close(
        ratios, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    shares = tw.band_shares(ratios)
    assert shares.low == pytest.approx(sum(expected[:3]))
    assert shares.middle == pytest.approx(sum(expected[3:7]))
    assert shares.high == pytest.approx(sum(expected[7:]))


@given(st.integers(0, 2**31), st.integers(1, 20))
def test_the_ratios_of_any_partition_sum_to_one(seed, count):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(count, BATCH.mask.shape, generator=generator)
    groups = torch.where(BATCH.mask, groups, -1)
    ratios = tw.group_projection_ratios(FOUND.projection_ratio, groups, BATCH.mask, count=count)
    assert float(ratios.sum()) == pytest.approx(1, abs=1e-9)


def test_what_is_no_partition_is_refused():
    groups = BATCH.deciles.clone()
    groups[0, 2] = -1
    with pytest.raises(TokenWeightsError, match=r"index \(0, 2\)"):
        tw.group_projection_ratios(FOUND.projection_ratio, groups, BATCH.mask, count=10)
    with pytest.raises(TokenWeightsError, match=r"\[0, 9\)"):
        tw.group_projection_ratios(FOUND.projection_ratio, BATCH.deciles, BATCH.mask, count=9)
    fewer = BATCH.mask.clone()
    fewer[0] = False
    with pytest.raises(TokenWeightsError, match="sums to one"):
        tw.group_projection_ratios(FOUND.projection_ratio, BATCH.deciles, fewer, count=10)
    for options in ({"count": 0}, {"count": -1}, {"count": 10, "tolerance": float("nan")}):
        with pytest.raises(TokenWeightsError, match=f"`{list(options)[-1]}` >"):
            tw.group_projection_ratios(FOUND.projection_ratio, BATCH.deciles, BATCH.mask, **options)
    with pytest.raises(TokenWeightsError, match="ten"):
        tw.band_shares(torch.ones(9))
    with pytest.raises(TokenWeightsError, match="sum other than 0"):
        tw.band_shares(torch.tensor([1.0, -1.0] * 5))


def test_a_zero_gradient_has_no_ratios_and_no_shares():
    ratios = tw.group_projection_ratios(
        torch.full(BATCH.mask.shape, torch.nan), BATCH.deciles, BATCH.mask, count=10
    )
    assert ratios.isnan().all() and len(ratios) == 10
    assert all(math.isnan(share) for share in vars(tw.band_shares(ratios)).values())


def test_extreme_tokens_are_sorted_and_valid():
    ratios = torch.tensor([[0.1, -0.3, 9.0], [-0.5, 0.7, -0.3]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert tw.extreme_tokens(ratios, mask, count=3).tolist() == [[1, 0], [0, 1], [1, 2]]
    assert tw.extreme_tokens(ratios, mask, count=1, largest=True).tolist() == [[1, 1]]
    assert len(tw.extreme_tokens(ratios, mask, count=2**70)) == 5
    assert tw.extreme_tokens(ratios, mask, count=0).shape == (0, 2)
    ratios[1, 1] = torch.nan
    assert tw.extreme_tokens(ratios, mask, count=1, largest=True).tolist() == [[0, 0]]
    assert len(tw.extreme_tokens(ratios, mask, count=99)) == 4
    with pytest.raises(TokenWeightsError, match="`count` >= 0, got -1"):
        tw.extreme_tokens(ratios, mask, count=-1)
