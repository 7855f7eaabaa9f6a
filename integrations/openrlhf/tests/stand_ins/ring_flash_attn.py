"""Attention of packed rows that are sliced over ranks, without kernels and without a ring.

Every rank gathers all keys and values and attends with its own queries. What OpenRLHF does around
the attention (slicing, padding, positions, gathering) is its own.
"""

import torch
import torch.distributed as dist
from flash_attn.utils.distributed import all_gather
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

RING = {}


def update_ring_flash_attn_params(cu_seqlens, group):
    RING["cu_seqlens"] = cu_seqlens


def substitute_hf_flash_attn(group, heads_k_stride):
    RING["group"] = group
    ALL_ATTENTION_FUNCTIONS["sdpa"] = ring_attention  # flash attention does not load on a CPU


def ring_attention(module, query, key, value, attention_mask, scaling=None, **options):
    group, local = RING["group"], query.shape[2]
    key, value = (all_gather(part[0].transpose(0, 1), group) for part in (key, value))
    places = torch.arange(len(key))
    sequence = torch.bucketize(places, RING["cu_seqlens"], right=True)
    own = dist.get_rank(group) * local + torch.arange(local)
    visible = (sequence[own][:, None] == sequence) & (own[:, None] >= places)
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.transpose(0, 1).repeat_interleave(repeats, 0) for part in (key, value))
    scores = query[0] @ key.transpose(1, 2) * scaling
    shares = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return (shares @ value)[None].transpose(1, 2), None
