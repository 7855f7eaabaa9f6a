import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, batch, eager_entropy, tiny
from torch import nn

import tokenweights as tw
from tokenweights import TokenWeightsError


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1])
def test_entropy_agrees_with_the_models_own_eager_attention(family, layer):
    model, (ids, mask) = tiny(family), batch()
    with torch.no_grad(), tw.capture_attention(model, [layer]) as capture:
        output = model(ids, attention_mask=mask.long(), output_attentions=True)
    (captured,) = capture.calls[layer]
    entropy = captured.entropy(key_mask=mask)
    expected = eager_entropy(output.attentions[layer], mask)
    torch.testing.assert_close(entropy.double(), expected, atol=1e-5, rtol=1e-5)
    assert expected[mask].std() > 0.02, "the test needs distributions that differ"


@pytest.mark.parametrize(
    ("family", "attentions"),
    [("qwen3", ("eager", "sdpa")), ("gemma2", ("eager",)), ("deepseek_v3", ("eager", "sdpa"))],
)
def test_the_model_computes_the_same_with_and_without_the_tap(family, attentions):
    ids, mask = batch()
    for attention in attentions:
        model = tiny(family, attention)
        plain = model(ids, attention_mask=mask.long()).logits
        with tw.capture_attention(model, [0, -1]) as capture:
            tapped = model(ids, attention_mask=mask.long()).logits
        assert torch.equal(plain, tapped)
        assert list(capture.calls) == [0, 3]
        assert torch.equal(plain, model(ids, attention_mask=mask.long()).logits)


def test_backends_capture_the_same_and_the_registry_is_left_as_it_was():
    ids, mask = batch()
    entropies = []
    for attention in ("eager", "sdpa"):
        model = tiny("qwen3", attention)
        interface = __import__(
            "transformers.models.qwen3.modeling_qwen3", fromlist=["x"]
        ).ALL_ATTENTION_FUNCTIONS
        before = dict(interface._local_mapping)
        with pytest.raises(RuntimeError), tw.capture_attention(model, [2]) as capture:
            model(ids, attention_mask=mask.long())
            raise RuntimeError
        assert interface._local_mapping == before
        entropies.append(capture.calls[2][0].entropy(key_mask=mask))
    torch.testing.assert_close(*entropies)


def test_rows_and_reduce_keep_only_what_was_asked():
    model, (ids, mask) = tiny("qwen3"), batch()
    with tw.capture_attention(model, [1]) as capture:
        model(ids, attention_mask=mask.long())
    full = capture.calls[1][0].entropy(key_mask=mask)
    with tw.capture_attention(model, [1], rows=5) as capture:
        model(ids, attention_mask=mask.long())
    captured = capture.calls[1][0]
    assert captured.query.shape[2] == 5 and not captured.query.requires_grad
    torch.testing.assert_close(captured.entropy(key_mask=mask), full[:, -5:])
    with tw.capture_attention(
        model, [1], reduce=lambda seen: seen.entropy(key_mask=mask)
    ) as capture:
        model(ids, attention_mask=mask.long())
    torch.testing.assert_close(capture.calls[1], [full])


def test_nested_captures_both_see_every_call():
    model, (ids, _) = tiny("qwen3"), batch()
    with tw.capture_attention(model, [0]) as outer, tw.capture_attention(model, [0, 1]) as inner:
        model(ids)
    assert len(outer.calls[0]) == len(inner.calls[0]) == len(inner.calls[1]) == 1


def test_another_model_is_not_captured():
    probed, other, (ids, _) = tiny("qwen3"), tiny("qwen3"), batch()
    with tw.capture_attention(probed, [0]) as capture:
        other(ids)
    assert capture.calls == {0: []}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_outside_the_capture(reentrant):
    model, (ids, mask) = tiny("qwen3").train(), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in newer transformers
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with tw.capture_attention(model, [1]) as capture:
        logits = model(ids, attention_mask=mask.long(), use_cache=False).logits
    logits.logsumexp(-1).sum().backward()
    assert len(capture.calls[1]) == 1


def test_middle_layer():
    assert tw.middle_layer(36) == 20
    with pytest.raises(TokenWeightsError):
        tw.middle_layer(0)


def test_unknown_layers_and_models_are_refused():
    model = tiny("qwen3")
    for layer in (4, -5):
        with (
            pytest.raises(TokenWeightsError, match=r"\[0, 1, 2, 3\], got"),
            tw.capture_attention(model, [layer]),
        ):
            pass
    with (
        pytest.raises(TokenWeightsError, match="Linear"),
        tw.capture_attention(nn.Linear(1, 1), []),
    ):
        pass
    with pytest.raises(TokenWeightsError, match="rows"), tw.capture_attention(model, [0], rows=0):
        pass


def test_attention_that_query_and_key_do_not_determine_is_refused():
    ids, _ = batch()
    model = tiny("qwen3")
    model.model.layers[0].self_attn.config = SimpleNamespace(
        layer_types=["chunked_attention"], _attn_implementation="eager"
    )
    with (
        pytest.raises(TokenWeightsError, match="chunked_attention"),
        tw.capture_attention(model, [0]),
    ):
        model(ids)
    # Without a mask only the layer itself says whether later keys are hidden.
    for attention in ("sdpa", "flash_attention_2"):
        model = tiny("qwen3", "sdpa")
        layer = model.model.layers[0].self_attn
        layer.is_causal = False
        layer.config = SimpleNamespace(**{**vars(model.config), "_attn_implementation": attention})
        with pytest.raises(TokenWeightsError, match="not causal"), tw.capture_attention(model, [0]):
            model(ids)


def test_non_finite_attention_is_refused_where_it_is_read():
    model, (ids, mask) = tiny("qwen3"), batch()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.fill_(math.nan)
    with tw.capture_attention(model, [0]) as capture:
        model(ids, attention_mask=mask.long())
    with pytest.raises(TokenWeightsError, match="finite"):
        capture.calls[0][0].entropy(key_mask=mask)


def packed_positions(ids):
    return torch.cat([torch.arange(7), torch.arange(ids.shape[1] - 7)])[None].expand_as(ids)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_are_refused(attention):
    model, (ids, _) = tiny("qwen3", attention), batch()
    with pytest.raises(TokenWeightsError, match=r"packed|mask"), tw.capture_attention(model, [0]):
        model(ids, position_ids=packed_positions(ids), use_cache=False)


def test_a_bidirectional_mask_is_refused():
    model, (ids, _) = tiny("qwen3", "sdpa"), batch()
    everything = torch.ones(3, 1, 12, 12, dtype=torch.bool)
    with pytest.raises(TokenWeightsError, match="mask"), tw.capture_attention(model, [0]):
        model(ids, attention_mask=everything)


def test_a_static_cache_is_refused():
    model, (ids, mask) = tiny("qwen3", "sdpa"), batch()
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    with pytest.raises(TokenWeightsError, match="static"), tw.capture_attention(model, [0]):
        model.generate(ids, attention_mask=mask.long(), disable_compile=True, **options)


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gpt_oss"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_not_mistaken_for_another_mask(family, side):
    model, (ids, mask) = tiny(family), batch()
    if side == "right":
        ids, mask = ids.flip(-1), mask.flip(-1)
    mask[2, -2:] = side == "left"
    with torch.no_grad(), tw.capture_attention(model, [0, 1]) as capture:
        output = model(ids, attention_mask=mask.long(), output_attentions=True)
    for layer in (0, 1):
        entropy = capture.calls[layer][0].entropy(key_mask=mask)
        expected = eager_entropy(output.attentions[layer], mask)
        torch.testing.assert_close(entropy.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_decoding_over_a_growing_cache(family):
    model, (ids, mask) = tiny(family), batch()
    with torch.no_grad(), tw.capture_attention(model, [0], rows=1) as capture:
        tokens = model.generate(
            ids, attention_mask=mask.long(), max_new_tokens=4, do_sample=False, eos_token_id=None
        )
    steps = [call.query.shape[2] for call in capture.calls[0]]
    assert steps == [1] * 4
    whole = torch.cat([mask, torch.ones(3, 3, dtype=torch.bool)], 1)
    decoded = torch.cat(
        [call.entropy(key_mask=whole[:, : call.key.shape[2]]) for call in capture.calls[0]], 1
    )
    with torch.no_grad(), tw.capture_attention(model, [0]) as capture:
        model(tokens[:, :-1], attention_mask=whole.long())
    expected = capture.calls[0][0].entropy(key_mask=whole)[:, -4:]
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)
