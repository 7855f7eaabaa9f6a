"""Ways to the attention entropy of every query, ours and others', and attention itself.

Each takes query, key and the log-sum-exp of the softmax, `1 heads token dim`, causal. The
attention forwards need a value as well; they compute something else, on the same layer, and stand
for a price that every training step pays anyway.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenweights import Received, attention_entropy, attention_received, attention_statistics

Contender = Callable[[Tensor, Tensor, Tensor], object]
# Rows of the versions that work off a block at a time.
BLOCK = 512
# Distances of the queries that count for what a key receives.
HORIZON = (10, 50)


def contenders(device: str, backend: str, *, toy: bool = False) -> dict[str, Contender]:
    """Everything that can be timed on this device, by the name it has in tables.

    A toy run tries what a GPU would be given, and finds what is not available.
    """
    found: dict[str, Contender] = {
        "entropy, lse given": lambda q, k, lse: attention_entropy(q, k, lse=lse, backend=backend),
        "entropy": lambda q, k, lse: attention_entropy(q, k, backend=backend),
        "all statistics, lse given": lambda q, k, lse: attention_statistics(
            q, k, lse=lse, backend=backend
        ),
        "received, lse given": lambda q, k, lse: attention_received(q, k, lse=lse, backend=backend),
        "received": lambda q, k, lse: attention_received(q, k, backend=backend),
        "received, horizon 10 to 50": lambda q, k, lse: attention_received(
            q, k, horizon=HORIZON, backend=backend
        ),
        "entropy and received": lambda q, k, lse: (
            attention_statistics(
                q, k, kinds=("normalized",), received=Received(), backend=backend
            ).received
        ),
        "eager, materialised": lambda q, k, lse: eager_entropy(q, k),
        "torch.compile": compiled_entropy,
        "FlexAttention + compiled blocks": flex_entropy,
    }
    if device == "cpu" and not toy:
        found["attention forward, SDPA"] = lambda q, k, lse: sdpa(q, k, None)
        return found
    found["attention forward, SDPA flash"] = lambda q, k, lse: sdpa(
        q, k, SDPBackend.FLASH_ATTENTION
    )
    found["attention forward, SDPA cuDNN"] = lambda q, k, lse: sdpa(
        q, k, SDPBackend.CUDNN_ATTENTION
    )
    if importlib.util.find_spec("flash_attn") is not None:
        found["attention forward, flash-attn"] = flash_attention
    return found


def needs_matrix(name: str) -> bool:
    """Whether a contender holds `heads x token x token` numbers."""
    return name in ("eager, materialised", "torch.compile")


def eager_entropy(query: Tensor, key: Tensor) -> Tensor:
    """Normalised entropy from the whole attention matrix, as eager attention leaves it."""
    tokens = query.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.transpose(2, 3)).float() * query.shape[3] ** -0.5
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    return normalised(weights.mean(1), torch.arange(1, tokens + 1, device=query.device))


def normalised(mean: Tensor, count: Tensor) -> Tensor:
    entropy = torch.special.entr(mean).sum(-1)
    return torch.where(count > 1, entropy / count.log().where(count > 1, 1.0), 0.0)


_compiled = torch.compile(eager_entropy, dynamic=False)


def compiled_entropy(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
    return _compiled(query, key)


@torch.compile(dynamic=False)
def _block_entropy(query: Tensor, key: Tensor, lse: Tensor, position: Tensor) -> Tensor:
    heads, kv_heads = query.shape[1], key.shape[1]
    stacked = query.unflatten(1, (kv_heads, heads // kv_heads))
    scores = (stacked @ key[:, :, None].transpose(3, 4)).float() * query.shape[3] ** -0.5
    weights = (scores.flatten(1, 2) - lse[..., None]).exp().mean(1)
    visible = position[:, None] >= torch.arange(key.shape[2], device=query.device)
    return normalised(weights.where(visible, 0.0), position + 1)


_flex = None


def flex_entropy(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
    """Log-sum-exp from FlexAttention, then compiled blocks of rows.

    FlexAttention reduces each head by itself; the mean over heads inside the logarithm has to be
    taken outside of it.
    """
    global _flex
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = query.shape[2]
    if _flex is None or _flex[0] != tokens:
        mask = create_block_mask(
            lambda b, h, q, k: q >= k, None, None, tokens, tokens, device=query.device.type
        )
        _flex = (tokens, torch.compile(flex_attention, dynamic=False), mask)
    _, attention, mask = _flex
    _, lse = attention(query, key, key, block_mask=mask, enable_gqa=True, return_lse=True)
    position = torch.arange(tokens, device=query.device)
    return torch.cat(
        [
            _block_entropy(query[:, :, rows], key, lse[:, :, rows], position[rows])
            for rows in (slice(start, start + BLOCK) for start in range(0, tokens, BLOCK))
        ],
        1,
    )


def sdpa(query: Tensor, key: Tensor, backend: SDPBackend | None) -> Tensor:
    """The attention forward of the same layer."""
    arguments = {"is_causal": True, "enable_gqa": query.shape[1] != key.shape[1]}
    if backend is None:
        return F.scaled_dot_product_attention(query, key, key, **arguments)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, key, **arguments)


def flash_attention(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    query, key = query.transpose(1, 2), key.transpose(1, 2)
    return flash_attn_func(query, key, key, causal=True)


def log_sum_exp(query: Tensor, key: Tensor) -> Tensor:
    """Softmax denominators in float32, a block of rows and a group of heads at a time."""
    tokens, group = query.shape[2], query.shape[1] // key.shape[1]
    lse = torch.empty(query.shape[:3], device=query.device)
    for head in range(query.shape[1]):
        keys = key[:, head // group].float().transpose(1, 2)
        for start in range(0, tokens, BLOCK):
            stop = min(start + BLOCK, tokens)
            scores = query[:, head, start:stop].float() @ keys[..., :stop] * query.shape[3] ** -0.5
            hidden = torch.ones(stop - start, stop, dtype=torch.bool, device=query.device)
            scores.masked_fill_(hidden.triu(start + 1), -torch.inf)
            lse[:, head, start:stop] = scores.logsumexp(-1)
    return lse
