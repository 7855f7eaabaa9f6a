import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, batch, eager_entropy, tiny
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

import tokenweights as tw
from tokenweights import TokenWeightsError
from tokenweights.capture.layers import registry


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
        functions = registry(model.model.layers[0].self_attn)
        before = dict(vars(functions))
        with pytest.raises(RuntimeError), tw.capture_attention(model, [2]) as capture:
            model(ids, attention_mask=mask.long())
            raise RuntimeError
        assert vars(functions) == before
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


def test_captures_may_end_in_any_order_and_beside_the_stand_in_of_another():
    model, (ids, _) = tiny("qwen3"), batch()
    functions = registry(model.model.layers[0].self_attn)
    first, second = tw.capture_attention(model, [0]), tw.capture_attention(model, [1])
    seen_first, seen_second = first.__enter__(), second.__enter__()
    model(ids)
    first.__exit__(None, None, None)
    model(ids)
    second.__exit__(None, None, None)
    assert (len(seen_first.calls[0]), len(seen_second.calls[1])) == (1, 2)
    assert "get_interface" not in vars(functions)

    asked = []

    def look_up(name, default):
        asked.append(name)
        return type(functions).get_interface(functions, name, default)

    functions.get_interface = look_up
    try:
        with tw.capture_attention(model, [0]) as capture:
            model(ids)
        assert asked == ["eager"] * 4 and len(capture.calls[0]) == 1
        assert functions.get_interface is look_up
    finally:
        del functions.get_interface


@pytest.mark.parametrize("other", ["gpt_oss", "gemma2", "gpt_neox", "gpt2"])
def test_other_models_compute_what_they_always_do(other):
    """Each file of models has an eager attention of its own; a tap must not lend one to another."""
    (ids, mask), model = batch(), tiny(other)
    expected = model(ids, attention_mask=mask.long()).logits
    for tapped in ("llama", "gpt_oss", "gemma2"):
        with tw.capture_attention(tiny(tapped), [1]) as capture:
            assert torch.equal(model(ids, attention_mask=mask.long()).logits, expected)
        assert capture.calls == {1: []}


def test_a_vision_tower_is_left_alone_and_the_text_layers_are_read():
    model = image_model()
    pixels = torch.randn(1, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.full((1, 4), 9), torch.randint(3, 8, (1, 8))], 1)
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        plain = model(**inputs, output_attentions=True)
        for layer in (0, 3):
            with tw.capture_attention(model, [layer]) as capture:
                tapped = model(**inputs)
            assert torch.equal(plain.logits, tapped.logits)
            assert torch.equal(plain.image_hidden_states, tapped.image_hidden_states)
            (call,) = capture.calls[layer]
            expected = eager_entropy(plain.attentions[layer], torch.ones_like(ids).bool())
            torch.testing.assert_close(call.entropy().double(), expected, atol=1e-5, rtol=1e-5)
    text = model.model.language_model
    assert list(tw.attention_layers(model).values()) == [b.self_attn for b in text.layers]


def image_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = SiglipVisionConfig(**sizes, num_hidden_layers=2, image_size=30, patch_size=15)
    text = LlamaConfig(**sizes, num_hidden_layers=4, num_key_value_heads=2, vocab_size=32)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=9)
    config.vision_feature_select_strategy = "full"
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


def test_a_decoder_is_read_beside_its_encoder_and_others_can_be_named():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "vocab_size": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(**sizes, **heads, encoder_ffn_dim=48, decoder_ffn_dim=48)
    model = BartForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    decoder = model.model.decoder
    assert list(tw.attention_layers(model).values()) == [b.self_attn for b in decoder.layers]
    assert tw.attention_layers(decoder) == tw.attention_layers(model)
    ids, mask = batch()
    with torch.no_grad(), tw.capture_attention(model, [1]) as capture:
        output = model(
            ids, attention_mask=mask.long(), decoder_input_ids=ids, output_attentions=True
        )
    expected = eager_entropy(output.decoder_attentions[1], torch.ones_like(mask))
    (call,) = capture.calls[1]
    torch.testing.assert_close(call.entropy().double(), expected, atol=1e-5, rtol=1e-5)
    encoder = model.model.encoder
    with pytest.raises(TokenWeightsError, match="mask"), tw.capture_attention(encoder, [0]):
        encoder(ids, attention_mask=mask.long())
    both = nn.ModuleDict({"first": tiny("qwen3"), "second": tiny("llama")})
    with pytest.raises(TokenWeightsError, match=r"get_submodule\('first.model'\)"):
        tw.attention_layers(both)
    named = both.get_submodule("first.model")
    assert len(tw.attention_layers(named)) == 4


def test_a_layer_that_attention_does_not_reach_once_is_refused_by_name():
    (ids, _), model = batch(), tiny("qwen3")
    skipped = model.model.layers[1]
    skipped.forward = lambda hidden, **_: hidden
    with (
        pytest.raises(TokenWeightsError, match=r"`model`.*layer 1 .*layers\.1\.self_attn.*0 calls"),
        tw.capture_attention(model, [0, 1]),
    ):
        model(ids)
    with tw.capture_attention(model, [0]) as capture:
        model(ids)
    assert len(capture.calls[0]) == 1
    looped = tiny("qwen3")
    looped.model.layers = nn.ModuleList([looped.model.layers[0]] * 4)
    with pytest.raises(TokenWeightsError, match="4 calls"), tw.capture_attention(looped, [0]):
        looped(ids, use_cache=False)
    upcast = GPT2LMHeadModel._from_config(
        GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, reorder_and_upcast_attn=True),
        attn_implementation="eager",
    )
    with pytest.raises(TokenWeightsError, match="0 calls"), tw.capture_attention(upcast, [1]):
        upcast(ids)


def test_a_forward_that_fails_leaves_no_count_behind():
    (ids, mask), model = batch(), tiny("qwen3")
    hook = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with tw.capture_attention(model, [0]) as capture:
        with pytest.raises(ZeroDivisionError):
            model(ids)
        hook.remove()
        model(ids, attention_mask=mask.long())
    assert len(capture.calls[0]) == 2
    assert not model.model._forward_hooks and not model.model._forward_pre_hooks


def test_a_class_of_the_users_own_is_tapped_where_its_code_stands():
    class Attention(Qwen3Attention):
        pass

    (ids, mask), model = batch(), tiny("qwen3")
    for block in model.model.layers:
        block.self_attn.__class__ = Attention
    with torch.no_grad(), tw.capture_attention(model, [1]) as capture:
        output = model(ids, attention_mask=mask.long(), output_attentions=True)
    expected = eager_entropy(output.attentions[1], mask)
    (call,) = capture.calls[1]
    torch.testing.assert_close(call.entropy().double(), expected, atol=1e-5, rtol=1e-5)


def test_options_may_stand_behind_the_mask_without_a_name():
    model = tiny("llama")
    layer, hidden = model.model.layers[0].self_attn, torch.randn(1, 12, 32)
    functions = registry(layer)

    def forward(self, hidden, mask):
        query, key = (
            project(hidden).view(1, 12, -1, 8).transpose(1, 2)
            for project in (self.q_proj, self.k_proj)
        )
        attend = functions.get_interface("eager", llama.eager_attention_forward)
        return attend(self, query, key, key, mask, 0.5)[0]

    forward.__globals__["ALL_ATTENTION_FUNCTIONS"] = functions
    mask = torch.zeros(1, 1, 12, 12).masked_fill(
        torch.ones(12, 12).triu(1).bool(), torch.finfo(torch.float32).min
    )
    try:
        layer.__class__ = type("Positional", (type(layer),), {"forward": forward})
        with tw.capture_attention(model, [0]) as capture:
            layer(hidden, mask)
    finally:
        del forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
    assert capture.calls[0][0].scale == 0.5


def test_a_compiled_model_is_tapped_whether_it_ran_before_or_not():
    torch.compiler.reset()
    (ids, mask), model = batch(), tiny("llama", "sdpa")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        with tw.capture_attention(model, [1]) as expected:
            model(ids, attention_mask=mask.long())
        for _ in range(2):
            with tw.capture_attention(compiled, [1]) as capture:
                compiled(ids, attention_mask=mask.long())
            assert len(capture.calls[1]) == 1
            torch.testing.assert_close(capture.calls[1][0].query, expected.calls[1][0].query)
            compiled(ids, attention_mask=mask.long())


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
    with tw.capture_attention(model, [1]) as capture:
        logits = model(ids, attention_mask=mask.long(), use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
    assert len(capture.calls[1]) == 1, "recomputation inside the capture is not seen either"


def test_middle_layer():
    assert tw.middle_layer(36) == 20
    with pytest.raises(TokenWeightsError):
        tw.middle_layer(0)


@pytest.mark.parametrize(
    ("family", "attention"), [("qwen3", "eager"), ("qwen3", "sdpa"), ("gemma2", "eager")]
)
def test_under_autocast_entropies_are_those_of_what_attention_rounds_to(family, attention):
    """Weights in float32: normalized and rotated queries are float32, and products bfloat16."""
    model, (ids, mask) = tiny(family, attention), batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with tw.capture_attention(model, [0]) as capture:
            model(ids, attention_mask=mask.long())
        products = (capture.calls[0][0].query @ capture.calls[0][0].query.mT).dtype
    (call,) = capture.calls[0]
    assert (call.query.dtype, call.precision, products) == (
        *(torch.float32, torch.bfloat16),
        torch.bfloat16,
    )
    rounded = replace(call, query=call.query.bfloat16(), key=call.key.bfloat16(), precision=None)
    exact = replace(call, precision=None).entropy(key_mask=mask)
    found = call.entropy(key_mask=mask)
    assert torch.equal(found, rounded.entropy(key_mask=mask)) and found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.05
    # Nothing is rounded that attention does not round.
    for kind, enabled in ((model.double(), True), (model.bfloat16(), True), (model.float(), False)):
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
            tw.capture_attention(kind, [0]) as capture,
        ):
            kind(ids, attention_mask=mask.long())
        call = capture.calls[0][0]
        rounds = call.query.dtype == torch.float32 and enabled
        assert call.precision == (torch.bfloat16 if rounds else None)


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
