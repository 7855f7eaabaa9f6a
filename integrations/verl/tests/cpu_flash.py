"""A stand-in for the flash attention kernel on CPUs, under the name `flash_cpu`.

Only the kernel is ours: transformers' way to it and VeRL's all-to-all around it are real.
"""

import itertools

import torch


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale,
    causal,
    **options,
):
    """Causal attention within each sequence, `token heads dim`."""
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k)
    bounds, outputs = cu_seqlens_q.tolist(), []
    for first, last in itertools.pairwise(bounds):
        own = [part[first:last].transpose(0, 1)[None] for part in (q, k, v)]
        output = torch.nn.functional.scaled_dot_product_attention(
            *own, is_causal=True, enable_gqa=True, scale=softmax_scale
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def register():
    import transformers.modeling_flash_attention_utils as flash
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.masking_utils import flash_attention_mask

    functions = (None, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input)
    flash._lazy_imports = lambda implementation, *args, **kwargs: functions
    AttentionInterface.register("flash_cpu", flash_attention_forward)
    AttentionMaskInterface.register("flash_cpu", flash_attention_mask)
