import pytest
import torch
from torch import nn

import tokenweights as tw
from tokenweights import TokenWeightsError


def setting():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    inputs = torch.randn(3, 10, 3, dtype=torch.float64)
    mask = torch.arange(10) < torch.tensor([[10], [4], [0]])
    return model, torch.where(mask, model(inputs)[..., 0], torch.nan), mask


def test_groups_agree_with_one_backward_pass_each_and_add_up():
    model, token_loss, mask = setting()
    scores = torch.rand(mask.shape)
    bins = tw.quantile_bins(scores, mask, bins=3)
    gradients = tw.group_gradients(token_loss, bins, model.parameters(), mask=mask)
    assert len(gradients.groups) == 3
    for number, gradient in enumerate(gradients.groups):
        model.zero_grad()
        (token_loss[bins == number].sum() / mask.sum()).backward(retain_graph=True)
        for got, parameter in zip(gradient, model.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad)
    added = [sum(parts) for parts in zip(*gradients.groups, strict=True)]
    torch.testing.assert_close(added, list(gradients.total))
    ratios = [tw.gradient_geometry(g, gradients.total).projection_ratio for g in gradients.groups]
    assert sum(ratios) == pytest.approx(1)


def test_selected_tokens_divide_by_the_group():
    model, token_loss, mask = setting()
    groups = torch.where(mask, 0, -1)
    groups[0, :2] = 1
    every, selected = (
        tw.group_gradients(
            token_loss, groups, model.parameters(), mask=mask, denominator=denominator
        )
        for denominator in ("all_tokens", "selected_tokens")
    )
    for one, other in zip(every.groups[1], selected.groups[1], strict=True):
        torch.testing.assert_close(one * 14 / 2, other)


def test_tokens_off_the_mask_and_in_no_group():
    model, token_loss, mask = setting()
    nothing = tw.group_gradients(
        token_loss, torch.full(mask.shape, -1), model.parameters(), mask=mask
    )
    assert nothing.groups == ()
    empty = tw.group_gradients(
        token_loss, torch.zeros_like(mask).long(), model.parameters(), mask=mask & False
    )
    assert empty.groups == () and all((g == 0).all() for g in empty.total)


def test_nonsense_is_refused():
    model, token_loss, mask = setting()
    groups = torch.zeros_like(mask).long()
    with pytest.raises(TokenWeightsError, match="graph"):
        tw.group_gradients(token_loss.detach(), groups, model.parameters(), mask=mask)
    with pytest.raises(TokenWeightsError, match="parameters"):
        tw.group_gradients(token_loss, groups, [torch.zeros(1)], mask=mask)
    with pytest.raises(TokenWeightsError, match="`groups` >= -1, got -2"):
        tw.group_gradients(token_loss, groups - 2, model.parameters(), mask=mask)
