"""Padding is taken out of a batch, and put back."""

import torch
from einops import rearrange

__all__ = ["index_first_axis", "pad_input", "rearrange", "unpad_input"]


def index_first_axis(rows, indices):
    return rows[indices]


def unpad_input(batch, mask):
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    rows = rearrange(batch, "b s ... -> (b s) ...")[indices]
    return rows, indices, cu_seqlens, int(lengths.max()), lengths


def pad_input(rows, indices, batch, seqlen):
    padded = rows.new_zeros(batch * seqlen, *rows.shape[1:])
    padded = padded.index_put((indices,), rows)
    return rearrange(padded, "(b s) ... -> b s ...", b=batch)
