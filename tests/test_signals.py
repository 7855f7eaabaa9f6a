import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tokenweights as tw
from tokenweights import TokenWeightsError


@given(st.integers(0, 3), st.integers(0, 5), st.integers(1, 40), st.integers(1, 7), st.integers())
def test_equation_19_agrees_with_numpy(batch, token, vocab, chunk, seed):
    generator = np.random.default_rng(abs(seed))
    logits = generator.normal(scale=8, size=(batch, token, vocab))
    probs = np.exp(logits - logits.max(-1, keepdims=True, initial=-1e9))
    probs /= probs.sum(-1, keepdims=True)
    expected = -(probs * np.log(probs)).sum(-1)
    entropy = tw.predictive_entropy(torch.tensor(logits), chunk_tokens=chunk)
    np.testing.assert_allclose(entropy.numpy(), expected, atol=5e-6)


def test_predictive_entropy_of_forbidden_tokens_and_low_precision():
    logits = torch.tensor([[[0.0, 0.0, -math.inf]]])
    assert tw.predictive_entropy(logits).item() == pytest.approx(math.log(2))
    assert tw.predictive_entropy(logits.bfloat16()).item() == pytest.approx(math.log(2))
    certain = torch.tensor([[[0.0, -math.inf]]])
    assert tw.predictive_entropy(certain).item() == 0.0


@given(st.integers(0, 3), st.integers(0, 5), st.integers(1, 40), st.integers(1, 7), st.integers())
def test_self_certainty_agrees_with_numpy(batch, token, vocab, chunk, seed):
    generator = np.random.default_rng(abs(seed))
    logits = generator.normal(scale=8, size=(batch, token, vocab))
    logits[generator.random(logits.shape) < 0.2] = -np.inf
    logits[..., 0] = 1.0
    allowed = np.isfinite(logits)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    count = allowed.sum(-1)
    expected = -np.log(count) - np.where(allowed, log_probs, 0).sum(-1) / count
    certainty = tw.self_certainty(torch.tensor(logits), chunk_tokens=chunk)
    assert certainty.dtype == torch.float32 and (certainty >= 0).all()
    np.testing.assert_allclose(certainty.numpy(), expected, rtol=1e-6, atol=5e-6)


def test_self_certainty_by_hand():
    # p = 3/4, 1/4: -log 2 - (log 3/4 + log 1/4) / 2.
    logits = torch.tensor([[[math.log(3), 0.0, -math.inf], [2.0, 2.0, 2.0]]])
    expected = torch.tensor([[math.log(4) - math.log(2) - math.log(3) / 2, 0.0]])
    torch.testing.assert_close(tw.self_certainty(logits), expected)
    torch.testing.assert_close(tw.self_certainty(logits + 1000), expected, rtol=0, atol=5e-5)
    assert tw.self_certainty(torch.tensor([[[0.0, -math.inf]]])).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_self_certainty_of_the_widest_logits_is_finite(dtype):
    top = torch.finfo(dtype).max
    logits = torch.tensor([[[top, -top], [top, top], [-top, -top]]], dtype=dtype)
    certainty = tw.self_certainty(logits)
    assert certainty.isfinite().all() and certainty[0, 1:].tolist() == [0.0, 0.0]
    # Half of the gap, less log 2; a gap beyond float32 gives its largest number.
    expected = min(float(top), torch.finfo(torch.float32).max)
    assert certainty[0, 0] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("room", [1, 21, 100])
def test_self_certainty_in_blocks_of_any_size(monkeypatch, room):
    logits = torch.randn(4, 6, 7)[:, 1:]
    whole = tw.self_certainty(logits)
    monkeypatch.setattr("tokenweights.signals.CPU_CHUNK_LOGITS", room)
    with LargestTensor(beside=logits) as largest:
        parts = tw.self_certainty(logits)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    assert largest.elements <= max(room, 20)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that is made, views of one tensor left out."""

    def __init__(self, *, beside):
        super().__init__()
        self.elements, self.storage = 0, beside.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() != self.storage:
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("shape", [(1, 9, 7), (9, 1, 7), (4, 5, 7), (2, 3, 400)])
@pytest.mark.parametrize("room", [1, 21, 100])
def test_blocks_of_any_size_give_the_same_without_a_copy(monkeypatch, shape, room):
    monkeypatch.setattr("tokenweights.signals.CPU_CHUNK_LOGITS", room)
    whole = torch.randn(shape[0], shape[1] + 1, shape[2])
    logits = whole[:, 1:]
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()
    with LargestTensor(beside=logits) as largest:
        entropy = tw.predictive_entropy(logits)
    torch.testing.assert_close(entropy.double(), expected, rtol=0, atol=1e-6)
    assert largest.elements <= max(room, shape[2], entropy.numel())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_predictive_entropy_of_the_widest_logits(dtype):
    top = torch.finfo(dtype).max
    logits = torch.tensor([[[top, -top], [top, top], [-top, -top]]], dtype=dtype)
    torch.testing.assert_close(
        tw.predictive_entropy(logits), torch.tensor([[0.0, math.log(2), math.log(2)]])
    )


def test_a_row_without_a_distribution_has_no_entropy():
    logits = torch.tensor([[[-math.inf] * 2, [math.inf, 0.0], [math.nan, 0.0], [0.0, 0.0]]])
    for signal in (tw.predictive_entropy, tw.self_certainty):
        assert signal(logits).isnan().tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("signal", [tw.predictive_entropy, tw.self_certainty])
def test_signals_of_logits_leave_their_input_alone(signal):
    logits = torch.randn(1, 3, 5, requires_grad=True)
    before = logits.detach().clone()
    assert not signal(logits).requires_grad
    assert torch.equal(logits.detach(), before)


def test_equation_23_loss_magnitude():
    assert tw.loss_magnitude(torch.tensor([[-2.0, 3.0]])).tolist() == [[2.0, 3.0]]


def test_relative_position_counts_valid_tokens():
    mask = torch.tensor([[False, True, True, False, True, True], [False] * 6])
    expected = [[0.0, 0.25, 0.5, 0.0, 0.75, 1.0], [0.0] * 6]
    assert tw.relative_position(mask).tolist() == expected


def test_alignment_of_left_padded_prompts():
    scores = torch.arange(6.0)[None]
    assert tw.align_to_decision(scores, response_length=3).tolist() == [[2.0, 3.0, 4.0]]
    assert tw.align_to_own(scores, response_length=3).tolist() == [[3.0, 4.0, 5.0]]


def test_alignment_of_right_padded_sequences():
    # Row 0 has 2 prompt and 3 response tokens, row 1 has 4 and 1.
    scores = torch.stack([torch.arange(5.0), torch.arange(5.0) + 10])
    lengths = torch.tensor([2, 4])
    decided = tw.align_to_decision(scores, response_length=3, prompt_length=lengths)
    assert decided.tolist() == [[1.0, 2.0, 3.0], [13.0, 14.0, 0.0]]
    own = tw.align_to_own(scores, response_length=3, prompt_length=lengths)
    assert own.tolist() == [[2.0, 3.0, 4.0], [14.0, 0.0, 0.0]]


def test_nothing_to_align():
    nothing = torch.zeros(2, 0)
    lengths = torch.zeros(2, dtype=torch.long)
    aligned = tw.align_to_own(nothing, response_length=3, prompt_length=lengths)
    assert aligned.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: tw.predictive_entropy(torch.rand(1, 1, 2), chunk_tokens=0),
        lambda: tw.predictive_entropy(torch.rand(1, 1, 0)),
        lambda: tw.self_certainty(torch.rand(1, 1, 2), chunk_tokens=0),
        lambda: tw.self_certainty(torch.rand(1, 1, 0)),
        lambda: tw.align_to_decision(torch.rand(1, 3), response_length=3),
        lambda: tw.align_to_own(torch.rand(1, 3), response_length=4),
        lambda: tw.align_to_own(torch.rand(1, 3), response_length=-1),
        lambda: tw.align_to_decision(
            torch.rand(1, 3), response_length=1, prompt_length=torch.tensor([0])
        ),
        lambda: tw.align_to_own(
            torch.rand(1, 3), response_length=1, prompt_length=torch.tensor([4])
        ),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(TokenWeightsError):
        make()
