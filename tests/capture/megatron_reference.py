"""A tiny GPT as megatron-core builds it, in plain torch and float64, one sequence at a time."""

import zlib

import torch
import torch.nn.functional as F

LAYERS, WIDTH, HEADS, DIM, FFN, VOCAB, EXPERTS, TOP = 4, 32, 8, 8, 48, 32, 4, 2


def whole(name, shape):
    """The parameter of that name, the same on every rank and in every layout."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (1 + 0.2 * drawn if "norm" in name else 0.3 * drawn).float()


def shapes(groups, experts=False):
    """Names and shapes of all parameters."""
    found = {"embedding.word_embeddings.weight": (VOCAB, WIDTH)}
    for layer in range(LAYERS):
        own = {
            "input_layernorm.weight": (WIDTH,),
            "self_attention.linear_qkv.weight": ((HEADS + 2 * groups) * DIM, WIDTH),
            "self_attention.q_layernorm.weight": (DIM,),
            "self_attention.k_layernorm.weight": (DIM,),
            "self_attention.linear_proj.weight": (WIDTH, HEADS * DIM),
            "pre_mlp_layernorm.weight": (WIDTH,),
        }
        parts = [f"mlp.experts.local_experts.{e}." for e in range(EXPERTS)] if experts else ["mlp."]
        for part in parts:
            own |= {
                f"{part}linear_fc1.weight": (FFN, WIDTH),
                f"{part}linear_fc2.weight": (WIDTH, FFN),
            }
        if experts:
            own["mlp.router.weight"] = (EXPERTS, WIDTH)
        found |= {f"decoder.layers.{layer}.{name}": shape for name, shape in own.items()}
    return found | {
        "decoder.final_layernorm.weight": (WIDTH,),
        "output_layer.weight": (VOCAB, WIDTH),
    }


class Reference:
    """The model; `parameters` by the names of megatron-core, layers counted over all stages."""

    def __init__(self, groups, experts=False):
        self.groups, self.experts = groups, experts
        self.parameters = {
            name: whole(name, shape).double().requires_grad_()
            for name, shape in shapes(groups, experts).items()
        }

    def __call__(self, ids, layer):
        """Log-probability of each next token, and the raw entropy of a layer's mean attention."""
        p = self.parameters
        hidden = p["embedding.word_embeddings.weight"][ids]
        for number in range(LAYERS):
            prefix = f"decoder.layers.{number}."
            normed = norm(hidden, p[f"{prefix}input_layernorm.weight"])
            attended, weights = self._attention(normed, f"{prefix}self_attention.")
            if number == layer:
                mean = weights.detach().mean(0)
                entropy = -torch.special.xlogy(mean, mean).sum(-1)
            hidden = hidden + attended
            normed = norm(hidden, p[f"{prefix}pre_mlp_layernorm.weight"])
            hidden = hidden + self._mlp(normed, f"{prefix}mlp.")
        hidden = norm(hidden, p["decoder.final_layernorm.weight"])
        log_probs = (hidden @ p["output_layer.weight"].T).log_softmax(-1)
        return log_probs[:-1].gather(1, ids[1:, None])[:, 0], entropy

    def _attention(self, hidden, prefix):
        p, shared_by = self.parameters, HEADS // self.groups
        mixed = hidden @ p[f"{prefix}linear_qkv.weight"].T
        mixed = mixed.view(-1, self.groups, shared_by + 2, DIM)
        query, key, value = mixed.split([shared_by, 1, 1], 2)
        query = rotated(norm(query.flatten(1, 2), p[f"{prefix}q_layernorm.weight"]))
        key = rotated(norm(key.flatten(1, 2), p[f"{prefix}k_layernorm.weight"]))
        key, value = (x.repeat_interleave(shared_by, 1) for x in (key, value.flatten(1, 2)))
        scores = torch.einsum("qhd,khd->hqk", query, key) * DIM**-0.5
        hidden_keys = torch.ones(len(hidden), len(hidden)).triu(1).bool()
        weights = scores.masked_fill(hidden_keys, -torch.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights, value).flatten(1)
        return out @ p[f"{prefix}linear_proj.weight"].T, weights

    def _mlp(self, hidden, prefix):
        p = self.parameters

        def dense(part):
            return (
                F.gelu(hidden @ p[f"{part}linear_fc1.weight"].T) @ p[f"{part}linear_fc2.weight"].T
            )

        if not self.experts:
            return dense(prefix)
        chosen, which = (hidden @ p[f"{prefix}router.weight"].T).topk(TOP)
        shares = torch.zeros(len(hidden), EXPERTS, dtype=hidden.dtype)
        shares = shares.scatter(1, which, chosen.softmax(-1))
        parts = [dense(f"{prefix}experts.local_experts.{e}.") for e in range(EXPERTS)]
        return torch.einsum("te,ted->td", shares, torch.stack(parts, 1))


def norm(values, weight):
    return values * (values.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def rotated(states):
    """Rotary embedding of `token heads dim`, halves of a head paired."""
    angles = torch.arange(len(states))[:, None] * 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    angles = torch.cat([angles, angles], 1)[:, None].double()
    first, second = states.chunk(2, -1)
    return states * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
