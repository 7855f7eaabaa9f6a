"""What megatron-core hard-codes to CUDA, turned aside for a process on a CPU.

`TEDotProductAttention` stands in for Transformer Engine's attention, which megatron-core needs for
context parallelism and packed rows: the same arguments, dense, with keys gathered over the ranks.
"""

import contextlib
import copy
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode


class OnCPU(TorchFunctionMode):
    """`device="cuda"` and pinned memory in the factories of tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)


@contextlib.contextmanager
def on_cpu():
    """A context in which megatron-core runs on a CPU; what it replaces it puts back."""
    with warnings.catch_warnings(action="ignore"):  # that there is no Transformer Engine, no Apex
        import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
        from megatron.core.fusions import fused_softmax
        from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer.moe import moe_utils
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def embedding_on_this_rank(embedding, dim, cp_group):
        ranks, rank = cp_group.size(), cp_group.rank()
        parts = embedding.chunk(2 * ranks, dim)
        return torch.cat([parts[rank], parts[2 * ranks - 1 - rank]], dim)

    def norm(cls, config, *args, **kwargs):
        # Torch's norms do not say that their gradients are partial under sequence parallelism.
        made = build(cls, plain(config), *args, **kwargs)
        for parameter in made.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return made

    def hidden(queries, keys, window):
        shown = torch.ones(queries, keys).tril(keys - queries + window[1])
        return ~shown.triu(keys - queries - window[0]).bool()

    def plain(config):
        config = copy.copy(config)
        config.sequence_parallel = False
        return config

    build = WrappedTorchNorm.__new__
    tracker = random.CudaRNGStatesTracker
    replaced = [
        (torch.cuda, "current_device", lambda: "cpu"),
        (torch.cuda, "synchronize", lambda *args, **kwargs: None),
        (torch.Tensor, "cuda", lambda self, *args, **kwargs: self),
        (rope_utils, "get_pos_emb_on_this_cp_rank", embedding_on_this_rank),
        (rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", embedding_on_this_rank),
        # There is no dropout, so the states of random numbers do not matter.
        (tracker, "fork", lambda self, *args, **kwargs: contextlib.nullcontext()),
        (random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (random, "_set_cuda_rng_state", lambda *args, **kwargs: None),
        (WrappedTorchNorm, "__new__", norm),
        # No mode of torch's functions reaches into a backward pass.
        (fused_softmax, "get_default_causal_mask", lambda size: hidden(size, size, (size, 0))),
        (fused_softmax, "get_sliding_window_causal_mask", hidden),
    ]
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1: a name that only exists with TE
        replaced.append((moe_utils, "te_general_gemm", None))
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        with OnCPU():
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, group):
        ctx.group = group
        parts = [torch.empty_like(values) for _ in range(group.size())]
        dist.all_gather(parts, values.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.group.rank()], None


def zigzag(lengths, ranks, rank):
    """Places of a rank's tokens in the row of sequences of these lengths."""
    places, start = [], 0
    for length in lengths:
        blocks = (start + torch.arange(length)).tensor_split(2 * ranks)
        both = [blocks[rank], blocks[2 * ranks - 1 - rank]] if ranks > 1 else [torch.cat(blocks)]
        places.append(torch.cat(both))
        start += length
    return torch.cat(places)


class TEDotProductAttention(nn.Module):
    """Stands in for megatron-core's class of this name."""

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
    ):
        super().__init__()
        self.config, self.cp = config, pg_collection.cp
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query,
        key,
        value,
        attention_mask,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ):
        packed, ranks, rank = packed_seq_params is not None, self.cp.size(), self.cp.rank()
        if packed:
            query, key, value = (states[:, None] for states in (query, key, value))
            lengths = packed_seq_params.cu_seqlens_q_padded.diff().tolist()
        else:
            lengths = [query.shape[0] * ranks]
        mine = zigzag(lengths, ranks, rank)
        if ranks > 1:
            order = torch.cat([zigzag(lengths, ranks, r) for r in range(ranks)]).argsort()
            key, value = (
                _Gathered.apply(states, self.cp).flatten(0, 1)[order] for states in (key, value)
            )
        sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        every = torch.arange(sum(lengths))
        visible = (sequence[mine][:, None] == sequence) & (mine[:, None] >= every)
        shared_by = query.shape[2] // key.shape[2]
        query, key, value = (states.permute(1, 2, 0, 3) for states in (query, key, value))
        key, value = (states.repeat_interleave(shared_by, 1) for states in (key, value))
        scores = (query @ key.transpose(2, 3) * self.scale).masked_fill(~visible, -torch.inf)
        out = (scores.softmax(-1) @ value).permute(2, 0, 1, 3)
        return (out[:, 0].flatten(1) if packed else out.flatten(2)).contiguous()


TEDotProductAttention.__module__ = "megatron.core.extensions.transformer_engine"
