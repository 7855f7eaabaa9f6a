"""Masks are read, whatever they are made of: right, or refused by name."""

import pytest
import torch
from tiny_models import batch, eager_entropy, tiny
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

import tokenweights as tw
from tokenweights import TokenWeightsError
from tokenweights.capture import masks
from tokenweights.capture.checks import _explained

# Compiling a block mask is what transformers does, and torch warns about some of its own ways.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

needs_vectors = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="torch's flex attention does not compile on a CPU without vector instructions",
)

IDS = torch.randint(3, 32, (1, 12), generator=torch.Generator().manual_seed(1))


def captured(model, layer, **inputs):
    with torch.no_grad(), tw.capture_attention(model, [layer]) as capture:
        output = model(use_cache=False, output_attentions=True, **inputs)
    (call,) = capture.calls[layer]
    return call, output.attentions[layer] if output.attentions else None


def refused(match, model, layer=0, **inputs):
    with (
        torch.no_grad(),
        pytest.raises(TokenWeightsError, match=match),
        tw.capture_attention(model, [layer]),
    ):
        model(use_cache=False, **inputs)


def close(entropy, expected):
    torch.testing.assert_close(entropy.double(), expected, atol=1e-5, rtol=1e-5)


def causal(tokens=12, batch=1):
    return torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(batch, 1, -1, -1).clone()


@needs_vectors
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_block_mask_is_read(family):
    ids, mask = batch()
    flex = tiny(family, "flex_attention")
    call, _ = captured(flex, 1, input_ids=ids, attention_mask=mask.long())
    expected, weights = captured(tiny(family), 1, input_ids=ids, attention_mask=mask.long())
    assert call.window == expected.window and torch.equal(call.key_mask, mask)
    close(call.entropy(), eager_entropy(weights, mask))


def together(batch, head, query, key):
    return (query >= key) & ((query >= 6) == (key >= 6))


def both_ways(batch, head, query, key):
    return (query >= key) | ((query < 4) & (key < 4))


def later_head(batch, head, query, key):
    return (query >= key) & ((head == 0) | (query - key < 3))


@pytest.mark.parametrize(("rule", "heads"), [(together, None), (both_ways, None), (later_head, 4)])
def test_a_block_mask_that_is_not_causal_is_refused(rule, heads):
    mask = create_block_mask(rule, 1, heads, 12, 12, device="cpu")
    refused("mask", tiny("llama", "flex_attention"), input_ids=IDS, attention_mask=mask)


def test_blocks_that_a_block_mask_leaves_out_are_hidden():
    def rule(batch, head, query, key):
        return query >= key

    tokens = 256
    block = create_block_mask(rule, 1, None, tokens, tokens, device="cpu")
    square = masks.block_mask(block, 1, tokens, tokens, device=torch.device("cpu"))
    assert torch.equal(square.shown(slice(0, tokens), slice(0, tokens)), causal(tokens))
    block.kv_num_blocks[:] = 0
    block.full_kv_num_blocks[:] = 0
    square = masks.block_mask(block, 1, tokens, tokens, device=torch.device("cpu"))
    assert not square.shown(slice(0, tokens), slice(0, tokens)).any()


def test_sequences_packed_into_a_row_are_refused_under_flex_attention():
    positions = torch.arange(6).repeat(2)[None]
    refused("packed", tiny("llama", "flex_attention"), input_ids=IDS, position_ids=positions)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_a_mask_adds_where_it_hides_nothing_is_refused(attention):
    bias = torch.zeros(1, 1, 12, 12).masked_fill(~causal(), torch.finfo(torch.float32).min)
    model = tiny("llama", attention)
    call, _ = captured(model, 0, input_ids=IDS, attention_mask=bias)
    assert call.key_mask.all()
    bias[..., 5, 2] = -0.5
    refused("bias", model, input_ids=IDS, attention_mask=bias)


def test_heads_that_see_different_keys_are_refused():
    mask = causal().expand(-1, 4, -1, -1).clone()
    model = tiny("llama", "sdpa")
    call, _ = captured(model, 0, input_ids=IDS, attention_mask=mask)
    assert call.window is None
    mask[:, 3, 7, 2] = False
    refused("mask", model, input_ids=IDS, attention_mask=mask)


def test_masks_that_cannot_be_read_are_refused():
    model = tiny("llama", "eager")
    layer, hidden = model.model.layers[0].self_attn, torch.randn(1, 12, 32)
    rotary = model.model.rotary_emb(hidden, torch.arange(12)[None])

    def refused_by_layer(match, mask, **options):
        with (
            torch.no_grad(),
            pytest.raises(TokenWeightsError, match=match),
            tw.capture_attention(model, [0]),
        ):
            layer(hidden, position_embeddings=rotary, attention_mask=mask, **options)

    refused_by_layer("int64", causal().long())
    refused_by_layer("shape", torch.zeros(12, 12))
    refused_by_layer("not causal", None)  # eager attention without a mask shows everything
    model.config._attn_implementation = "flex_attention"
    refused_by_layer("boolean", causal())
    refused_by_layer("not causal", None)
    model.config._attn_implementation = "sdpa"
    refused_by_layer("not causal", None, is_causal=False)
    refused_by_layer("sinks", causal(), s_aux=torch.zeros(4))
    refused_by_layer("list", [1])


def test_a_static_cache_is_refused_at_its_first_forward():
    model = tiny("qwen3", "sdpa")
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    with pytest.raises(TokenWeightsError, match="static"), tw.capture_attention(model, [0]):
        model.generate(IDS, disable_compile=True, **options)


@pytest.mark.parametrize("entries", [1, 40, 10**6])
def test_it_does_not_matter_how_much_of_a_mask_is_read_at_a_time(entries, monkeypatch):
    monkeypatch.setattr(masks, "ENTRIES_AT_ONCE", entries)
    ids, mask = batch()
    model = tiny("mistral")
    call, weights = captured(model, 1, input_ids=ids, attention_mask=mask.long())
    close(call.entropy(), eager_entropy(weights, mask))
    wrong = causal(batch=3)
    wrong[2, 0, 11, 3] = False
    refused("mask", tiny("llama"), input_ids=ids, attention_mask=wrong)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("tokens", [1024, 2048])
def test_reading_a_mask_takes_memory_that_does_not_grow_with_it(tokens, window):
    mask = causal(tokens, batch=4)
    if window:
        mask &= torch.ones(tokens, tokens, dtype=torch.bool).triu(1 - window)
    with Largest() as largest:
        found = _explained(masks.tensor_mask(mask, 4, tokens, tokens), window)
    assert found.window == window
    assert largest.bytes <= 8 * masks.ENTRIES_AT_ONCE  # one int64 for each entry of a block


HOLED = torch.ones(2, 12, dtype=torch.bool)
HOLED[0, 5:7] = False
HOLED[1, :3] = False


@pytest.mark.parametrize(
    "attention", ["eager", "sdpa", pytest.param("flex_attention", marks=needs_vectors)]
)
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_padding_inside_a_window_is_refused(family, attention):
    inputs = {"input_ids": IDS.repeat(2, 1), "attention_mask": HOLED.long()}
    refused("inside a window", tiny(family, attention), 1, **inputs)
    # Padding before the window, and holes under no window or one that reaches the start, are right.
    for mask, options in ((HOLED.roll(1, 0)[:1], {}), (HOLED[:1], {"sliding_window": 12})):
        model = tiny(family, "eager", **options)
        call, weights = captured(model, 1, input_ids=IDS, attention_mask=mask.long())
        close(call.entropy(), eager_entropy(weights, mask))
    call, weights = captured(tiny("llama"), 1, **inputs)
    close(call.entropy(), eager_entropy(weights, HOLED))


def test_the_padding_of_the_model_is_that_of_the_entropy():
    model, (ids, mask) = tiny("qwen3", "sdpa"), batch()
    call, _ = captured(model, 0, input_ids=ids, attention_mask=mask.long())
    assert torch.equal(call.entropy(), call.entropy(key_mask=mask))
    other = mask.clone()
    other[0, 3] = True
    with pytest.raises(TokenWeightsError, match="the same mask"):
        call.entropy(key_mask=other)
    # Without a mask every token was real to the model; later padding changes nothing before it.
    call, _ = captured(model, 0, input_ids=ids)
    with pytest.raises(TokenWeightsError, match="the same mask"):
        call.entropy(key_mask=mask)
    right = mask.flip(1)
    # Fewer keys are other sums of a matrix product, so not the same to the last bit everywhere.
    close(call.entropy(key_mask=right), torch.where(right, call.entropy(), 0.0).double())


def test_keys_that_left_a_window_do_not_matter_to_its_padding():
    model, (ids, mask) = tiny("mistral"), batch()
    with torch.no_grad(), tw.capture_attention(model, [0], rows=1) as capture:
        model.generate(ids, attention_mask=mask.long(), max_new_tokens=3, eos_token_id=None)
    last = capture.calls[0][-1]
    whole = torch.cat([mask, torch.ones(3, 2, dtype=torch.bool)], 1)[:, -last.key.shape[2] :]
    assert torch.equal(last.entropy(), last.entropy(key_mask=whole))
