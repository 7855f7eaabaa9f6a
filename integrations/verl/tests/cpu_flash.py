"""A stand-in for flash attention on CPUs: the same calls, sequences told apart by positions.

VeRL puts its all-to-all around `_flash_attention_forward` of transformers; everything above and
below that function is real here.
"""

import torch


def attention(query, key, value, attention_mask, query_length, *args, position_ids=None, **kwargs):
    """Causal attention of packed sequences, `1 token heads dim`."""
    assert attention_mask is None and query_length == query.shape[1]
    starts = (position_ids[0] == 0).nonzero().flatten().tolist() + [query_length]
    outputs = []
    for first, last in zip(starts, starts[1:], strict=False):
        q, k, v = (part[:, first:last].transpose(1, 2) for part in (query, key, value))
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, scale=kwargs.get("softmax_scale")
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def register():
    import transformers.integrations.flash_attention as interface
    import verl.models.transformers.monkey_patch as ulysses
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    def flash_cpu(module, query, key, value, attention_mask, scaling=None, **kwargs):
        forward = interface._flash_attention_forward  # VeRL's, where it does sequence parallelism
        kwargs.pop("dropout", None)
        output = forward(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attention_mask,
            query.shape[2],
            softmax_scale=scaling,
            position_ids=kwargs["position_ids"],
        )
        return output, None

    interface._flash_attention_forward = attention
    ulysses._flash_attention_forward = attention
    AttentionInterface.register("flash_cpu", flash_cpu)
    AttentionMaskInterface.register("flash_cpu", flash_attention_mask)
