"""Small models of many families with peaked attention, and their entropies from eager attention."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SLIDING = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "layer_types": SLIDING, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 5, "layer_types": SLIDING},
    "phi3": {"bos_token_id": 1, "eos_token_id": 2},
    "glm4": {},
    "olmo3": {"sliding_window": 5, "layer_types": SLIDING},
    "gpt_oss": {
        "sliding_window": 5,
        "layer_types": SLIDING,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt_neox": {"rotary_pct": 1.0},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
    },
}


def tiny(family: str, attention: str = "eager", **options) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    # Fresh models attend almost uniformly; larger projections make the distributions peaked.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and any(
                part in name for part in ("q_", "k_", "qkv", "query_key", "c_attn")
            ):
                parameter.normal_(0, 0.7)
            if name.endswith("sinks"):
                parameter.normal_(0, 1)
    return model.eval()


def batch():
    ids = torch.randint(3, 32, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, :4] = False  # left padding
    mask[1, :1] = False
    return ids.masked_fill(~mask, 0), mask


def eager_entropy(weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Normalised entropy from the model's own attention matrix, in float64."""
    average = weights.double().mean(1)
    average = average / average.sum(-1, keepdim=True)
    visible = (weights > 0).any(1).sum(-1).clamp(min=2)
    entropy = -torch.where(average > 0, average * average.log(), 0.0).sum(-1)
    return torch.where(mask, entropy / visible.log(), 0.0)
