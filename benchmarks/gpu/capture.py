"""Captured entropies through the attention functions of transformers, against eager weights."""

import torch
from step import Missing, Parts, Run

IMPLEMENTATIONS = ("sdpa", "flex_attention", "flash_attention_2")


def parts(run: Run) -> Parts:
    """Largest differences from eager attention, by attention function and layout."""
    return {
        f"{name}, {layout}": lambda name=name, layout=layout: difference(run, name, layout)
        for name in IMPLEMENTATIONS
        for layout in ("padded", "packed")
    }


def model(run: Run, layers: int) -> torch.nn.Module:
    """Random weights in the shape of Qwen3-8B's layers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    hidden, inner, heads, kv_heads, dim = (
        (32, 64, 4, 2, 16) if run.toy else (4096, 12288, 32, 8, 128)
    )
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=16384,
    )
    with torch.device(run.device):
        return Qwen3ForCausalLM(config).to(run.dtype).eval()


def difference(run: Run, implementation: str, layout: str) -> dict[str, float]:
    """Of the entropies of one layer, in nats over valid tokens."""
    import tokenweights as tw

    if run.toy and implementation != "sdpa":
        raise Missing(f"needs a device: {implementation} on a CPU")
    policy, tokens = model(run, 2), 24 if run.toy else 1024
    lengths = (tokens, tokens // 2)
    ids = torch.randint(0, 512, (2, tokens), device=run.device)
    mask = (
        torch.arange(tokens, device=run.device) < torch.tensor(lengths, device=run.device)[:, None]
    )
    policy.set_attn_implementation("eager")
    with torch.no_grad():
        weights = policy(ids, attention_mask=mask.long(), output_attentions=True).attentions[1]
    expected = tw.attention_entropy_from_weights(weights.float())[mask]
    policy.set_attn_implementation(implementation)
    packed = layout == "packed"
    with torch.no_grad(), tw.capture_attention(policy, [1], packed=packed) as capture:
        if packed:
            position = torch.cat([torch.arange(n, device=run.device) for n in lengths])[None]
            policy(ids[mask][None], position_ids=position, use_cache=False)
        else:
            policy(ids, attention_mask=mask.long(), use_cache=False)
    call = capture.calls[1][0]
    found = call.packed_entropy()[0] if packed else call.entropy(key_mask=mask)[mask]
    worst = float((found - expected).abs().max())
    limit = 1e-4 if run.toy else 3e-2  # eager weights are rounded to bfloat16
    assert worst <= limit, f"differs by {worst}"
    return {"largest difference": worst}
