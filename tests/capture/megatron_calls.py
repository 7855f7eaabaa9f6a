"""One rank of megatron-core on a CPU: single calls of the tap, read or refused."""

from contextlib import contextmanager

import torch
from capture.megatron_cpu import TEDotProductAttention, on_cpu
from capture.megatron_ranks import PROBED, Batch, Layout, built, passed
from torch import nn

import tokenweights as tw

TOKENS = 12


def forward(model, mask=None, **given):
    ids = torch.arange(2 * TOKENS).view(2, TOKENS) % 7
    with torch.no_grad():
        return model(ids, None, mask, **given)


def padding_mask():
    """Causal order, and a padded end of the second row; True where a key is hidden."""
    hidden = torch.ones(TOKENS, TOKENS).triu(1).bool().repeat(2, 1, 1, 1)
    hidden[1, :, :, 9:] = True
    return hidden


VARIANTS = {
    "plain": ({}, None),
    "a scale of its own": ({"softmax_scale": 0.7}, None),
    "scores scaled by the layer's number": (
        {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True},
        None,
    ),
    "a window": ({"window_size": (3, 0)}, None),
    "a window of every second layer": ({"window_size": (3, 0), "window_attn_skip_freq": 3}, None),
    "a window of the first layers": (
        {"window_size": (3, 0), "window_attn_skip_freq": [1, 1, 0, 0]},
        None,
    ),
    "learned sinks": ({"softmax_type": "learnable"}, None),
    "sinks of nothing": ({"softmax_type": "off-by-one"}, None),
    "padding": ({}, padding_mask()),
    "bfloat16": ({"bf16": True, "params_dtype": torch.bfloat16}, None),
}


def own_probabilities_on(rank, size, name):
    """Raw entropies of the probed layer, and the mean over heads of its own probabilities."""
    changes, mask = VARIANTS[name]
    with on_cpu():
        (model,) = built(Layout(), **changes)
        core = model.decoder.layers[PROBED].self_attention.core_attention
        if changes.get("softmax_type") == "learnable":
            core.softmax_offset.data.copy_(torch.linspace(-1, 1, 8))
        seen = []
        core.attention_dropout.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        with tw.capture_attention(model, [PROBED]) as capture:
            forward(model, mask)
        (call,) = capture.calls[PROBED]
        return call.entropy(kind="raw"), call.entropy(), seen[0].double().mean(1)


class Other(nn.Module):
    def forward(self, query, *_, **__):
        return query.flatten(2)


class Overriding(TEDotProductAttention):
    def forward(self, query, *_, **__):
        return query.flatten(2)


@contextmanager
def changed(owner, name, value):
    before = getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


def refusals_on(rank, size):
    """Messages of what is refused, by what is wrong; and whether the tap works afterwards."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

    messages = {}

    def told(name, model, layers=(PROBED,), change=None, mask=None, packed=False, **given):
        try:
            with change or changed(model, "training", True):
                with tw.capture_attention(model, layers, packed=packed) as capture:
                    forward(model, mask, **given)
            messages[name] = sorted(capture.calls)
        except tw.TokenWeightsError as error:
            messages[name] = str(error)

    with on_cpu():
        (model,) = built(Layout())
        attention = model.decoder.layers[PROBED].self_attention
        core, config = attention.core_attention, model.config
        for setting, value in {
            "fp8": "hybrid",
            "fp4": "e2m1",
            "multi_latent_attention": True,
            "experimental_attention_variant": "dsa",
            "mtp_num_layers": 1,
            "enable_cuda_graph": True,
            "external_cuda_graph": True,
            "cuda_graph_impl": "local",
            "flash_decode": True,
            "use_kitchen_attention": True,
        }.items():
            told(setting, model, change=changed(config, setting, value))
        told("window", model, change=changed(config, "window_size", (2, 1)))
        told("no such layer", model, (4,))
        told("no such last layer", model, (-5,))
        told("mask", model, mask=torch.rand(2, 1, TOKENS, TOKENS) < 0.5)
        told("mask kind", model, change=changed(attention, "attn_mask_type", AttnMaskType.no_mask))
        told("packed", model, packed=True)
        for name, module in {
            "core": Other(),
            "core forward": Overriding(
                config, 1, None, "self", pg_collection=attention.pg_collection
            ),
        }.items():
            told(name, model, change=changed(attention, "core_attention", module))
        kind = type("Latent", (MultiLatentAttention,), {})
        told("attention", model, change=changed(attention, "__class__", kind))
        with tw.capture_attention(model, [PROBED]):  # another path than the tapped module
            try:
                attention.core_attention = Other()
                forward(model)
            except tw.TokenWeightsError as error:
                messages["bypassed"] = str(error)
            attention.core_attention = core
        told("two stacks", nn.ModuleList([model, built(Layout())[0]]))
        told("last", model, (-1, 3, 0))
        with tw.capture_attention(model, [PROBED]) as capture:
            forward(model)
        for name, ask in {
            "key mask": lambda call: call.entropy(key_mask=torch.ones(2, TOKENS).bool()),
            "method": lambda call: call.packed_entropy(),
            "anything else": lambda call: call._rounded(),
        }.items():
            try:
                ask(capture.calls[PROBED][0])
            except tw.TokenWeightsError as error:
                messages[name] = str(error)
        try:
            with tw.capture_attention(model, [PROBED], rows=3):
                pass
        except tw.TokenWeightsError as error:
            messages["rows"] = str(error)

        layout = Layout(packed=True)
        (model,) = built(layout)
        part = Batch(layout, 0).parts[0][0]
        row = part["packed_seq_params"]
        assert isinstance(row, PackedSeqParams)
        for name, change, packed in (
            ("unpacked", changed(row, "max_seqlen_q", row.max_seqlen_q), False),
            ("dynamic", changed(row, "local_cp_size", 1), True),
            ("slices", changed(row, "cp_partition_mode", "contiguous"), True),
            ("boundaries", changed(row, "cu_seqlens_q_padded", row.cu_seqlens_q_padded + 8), True),
        ):
            try:
                with change, torch.no_grad():
                    with tw.capture_attention(model, [PROBED], packed=packed):
                        model(**part)
            except (tw.TokenWeightsError, RuntimeError) as error:
                messages[name] = str(error)
        with tw.capture_attention(model, [PROBED], packed=True) as capture, torch.no_grad():
            model(**part)
        (call,) = capture.calls[PROBED]
        messages["positions"] = call.position_ids[0].tolist(), call.key_mask[0].tolist()
    return messages


def stages_on(rank, size):
    """What the tap keeps on each of two pipeline stages, its layers, and a recipe's layers."""
    layout = Layout(pp=2)
    with on_cpu():
        from megatron.core import parallel_state as mpu

        chunks = built(layout)
        batch = Batch(layout, 0)
        with tw.capture_attention(
            chunks[0], [0, PROBED, -1], reduce=lambda call: call.layer
        ) as seen:
            passed(chunks, layout, batch)
        return (
            mpu.get_pipeline_model_parallel_rank(),
            seen.calls,
            list(tw.attention_layers(chunks[0])),
            tw.recipe("low2high").on_model(chunks[0]).layers,
        )


def seams_on(rank, size):
    """What of megatron-core the tap rests on, and is not as it should be."""
    with on_cpu():
        import dataclasses
        import inspect

        from megatron.core.packed_seq_params import PackedSeqParams
        from megatron.core.transformer.attention import Attention, SelfAttention
        from megatron.core.transformer.dot_product_attention import DotProductAttention
        from megatron.core.transformer.transformer_block import TransformerBlock
        from megatron.core.transformer.transformer_config import TransformerConfig

        from tokenweights.capture import megatron, megatron_layers

        known = {
            megatron_layers._BLOCK: TransformerBlock,
            megatron._ATTENTION: SelfAttention,
            megatron.LOCAL: DotProductAttention,
        }
        wrong = [n for n, cls in known.items() if f"{cls.__module__}.{cls.__qualname__}" != n]
        taken = list(inspect.signature(DotProductAttention.forward).parameters)[1:]
        if taken[: len(megatron._NAMES)] != list(megatron._NAMES):
            wrong.append(f"arguments of a core attention: {taken}")
        fields = {field.name for field in dataclasses.fields(TransformerConfig)}
        read = {*megatron._OFF, "cuda_graph_impl", "softmax_scale", "kv_channels"}
        read |= {"window_size", "window_attn_skip_freq", "num_layers"}
        wrong += sorted(read - fields)
        given = {field.name for field in dataclasses.fields(PackedSeqParams)}
        wrong += sorted(
            {"qkv_format", "cu_seqlens_q", "cu_seqlens_q_padded", "local_cp_size"} - given
        )
        if "forward" not in vars(Attention) or "forward" in vars(SelfAttention):
            wrong.append("the owner of the attention's forward")
        return wrong
