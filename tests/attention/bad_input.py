"""What every backend refuses, each case a change to a small valid call."""

import torch

TOKENS = 40


def arguments(device="cpu"):
    """A valid call."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, TOKENS, 64, generator=generator) for heads in (4, 2))
    return {"query": query.to(device), "key": key.to(device)}


def denominators(query, key, *, scale=None):
    """The log-sum-exp that belongs to a call."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.double() @ key.double().transpose(-1, -2)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf).logsumexp(-1).float()


def changed(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def _heads(query, key):
    return {"query": query[:, :3]}


def _non_finite_query(query, key):
    return {"query": changed(query, (1, 2, 33, 5), torch.nan)}


def _non_finite_key(query, key):
    return {"key": changed(key, (0, 1, 7, 5), torch.inf)}


def _foreign_lse(query, key):
    return {"lse": denominators(query, key, scale=0.14)}


def _rounded_lse(query, key):
    """As `flex_attention` of transformers hands it back in half precision."""
    return {"lse": denominators(query, key).bfloat16().float()}


def _nan_lse(query, key):
    return {"lse": denominators(query, key) * torch.nan}


CASES = {
    "mismatched heads": (_heads, "expected `query` to have a multiple of the key heads, got 3"),
    "non-finite query": (_non_finite_query, "expected `query` to be finite at real positions"),
    "non-finite key": (_non_finite_key, "expected `key` to be finite at real positions"),
    "foreign lse": (_foreign_lse, "This lse does not belong to these q and k"),
    "lse in bfloat16": (_rounded_lse, "This lse does not belong to these q and k"),
    "lse of NaN": (_nan_lse, "This lse does not belong to these q and k"),
}
