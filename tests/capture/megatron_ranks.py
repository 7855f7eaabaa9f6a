"""One rank of megatron-core on a CPU: a tiny GPT over a layout of ranks, probed and trained."""

import re
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from capture.megatron_cpu import TEDotProductAttention, on_cpu, zigzag
from capture.megatron_reference import DIM, EXPERTS, FFN, HEADS, LAYERS, TOP, VOCAB, WIDTH, whole

import tokenweights as tw
from tokenweights.distributed import held_by_one

# Prompts and responses; two micro-batches of two sequences.
LENGTHS = ((4, 9), (2, 5), (3, 7), (2, 4))
ADVANTAGES = (1.0, -0.7, 0.4, 1.3)
PROBED, STEP = 2, 30
RECIPE = "low2high"


@dataclass(frozen=True)
class Layout:
    """How the model and its batch lie on the ranks."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    sp: bool = False
    packed: bool = False
    groups: int = 4
    experts: bool = False
    chunks: int = 1
    recompute: str | None = None


def sequences():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (p + r,), generator=generator) for p, r in LENGTHS]


def built(layout, **changes):
    """The model's chunks on this rank, with parameters of their names."""
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.chunks if layout.chunks > 1 else None,
        context_parallel_size=layout.cp,
    )
    options = {
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_query_groups": layout.groups,
        "kv_channels": DIM,
        "ffn_hidden_size": FFN,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": layout.tp,
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.chunks if layout.chunks > 1 else None,
        "sequence_parallel": layout.sp,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "variable_seq_lengths": layout.packed and layout.pp > 1,
        "moe_token_dispatcher_type": "alltoall",
        "calculate_per_token_loss": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
    }
    if layout.experts:
        options |= {
            "num_moe_experts": EXPERTS,
            "moe_router_topk": TOP,
            "moe_ffn_hidden_size": FFN,
            "moe_token_dispatcher_type": "allgather",
            "moe_router_load_balancing_type": "none",
            "expert_tensor_parallel_size": layout.tp,
        }
    if layout.recompute == "full":
        options |= {"recompute_granularity": "full", "recompute_method": "uniform"}
        options["recompute_num_layers"] = 1
    elif layout.recompute:
        options |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    config = TransformerConfig(**options | changes)
    spec = get_gpt_layer_local_spec(
        num_experts=EXPERTS if layout.experts else None, qk_layernorm=True, normalization="RMSNorm"
    )
    if layout.packed or layout.cp > 1:
        spec.submodules.self_attention.submodules.core_attention = TEDotProductAttention
    chunks = []
    for chunk in range(layout.chunks):
        stage = {"vp_stage": chunk if layout.chunks > 1 else None}
        ends = {"ignore_virtual": False, **stage}
        model = GPTModel(
            config,
            spec,
            vocab_size=VOCAB,
            max_sequence_length=64,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            pre_process=mpu.is_pipeline_first_stage(**ends),
            post_process=mpu.is_pipeline_last_stage(**ends),
            **stage,
        )
        for name, parameter in global_parameters(model):
            place = shard(parameter, layout)
            shape = list(parameter.shape)
            if place is not None:
                shape[place] *= layout.tp
            full = whole(name, shape)
            rank = mpu.get_tensor_model_parallel_rank()
            own = full if place is None else full.chunk(layout.tp, place)[rank]
            parameter.data.copy_(own)
        chunks.append(model)
    return chunks


def shard(parameter, layout):
    """The axis along which tensor parallelism splits a parameter; None if it does not."""
    split = getattr(parameter, "tensor_model_parallel", False) and layout.tp > 1
    return parameter.partition_dim if split else None


def global_parameters(model):
    """Parameters with the layer's index in the whole model in their names."""
    first = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
    for name, parameter in model.named_parameters():
        yield re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) + first}", name), parameter


class Batch:
    """Two micro-batches as this rank has them."""

    def __init__(self, layout, cp_rank):
        self.layout, self.cp_rank = layout, cp_rank
        rows, unit = sequences(), 2 * layout.cp * layout.tp
        self.parts = [self._part(rows[i : i + 2], unit) for i in (0, 2)]

    def _part(self, rows, unit):
        from megatron.core.packed_seq_params import PackedSeqParams

        longest = max(map(sum, LENGTHS))
        lengths = [-(-(len(r) if self.layout.packed else longest) // unit) * unit for r in rows]
        ids, labels = torch.zeros(2, sum(lengths), dtype=torch.long)
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        for start, row in zip(starts, rows, strict=False):
            ids[start : start + len(row)] = row
            labels[start : start + len(row) - 1] = row[1:]
        own = zigzag(lengths, self.layout.cp, self.cp_rank)
        shape = (1, -1) if self.layout.packed else (2, -1)
        part = {"input_ids": ids[own].view(shape), "labels": labels[own].view(shape)}
        part |= {"position_ids": None, "attention_mask": None}
        if self.layout.packed:
            real = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
            laid = torch.tensor(starts).int()
            sizes = {"max_seqlen_q": max(lengths), "max_seqlen_kv": max(lengths)}
            part["packed_seq_params"] = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=real,
                cu_seqlens_kv=real,
                cu_seqlens_q_padded=laid,
                cu_seqlens_kv_padded=laid,
                **sizes,
            )
        return part, own, starts, [len(row) for row in rows]

    def by_sequence(self, values, group):
        """This rank's values of both micro-batches, `batch token`, as one row for each sequence."""
        found = []
        for part, (_, own, starts, lengths) in zip(values, self.parts, strict=True):
            row = tw.gathered(part.flatten(), own, dim=0, group=group)
            found += [row[s : s + n] for s, n in zip(starts, lengths, strict=False)]
        return found


def passed(chunks, layout, batch, losses=None):
    """A pass of both micro-batches through all stages: what the last stage made of each.

    With `losses`, a function from micro-batch and log-probabilities to a loss, also backwards.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    outputs = []

    def step(iterator, model):
        number, part = next(iterator)
        output = model(**part)

        def loss(values):
            outputs.append(-values.detach())
            made = values.sum() * 0 if losses is None else losses(number, -values)
            return made, torch.tensor(1, dtype=torch.int), {}

        return output, loss

    parts = [part for part, *_ in batch.parts]
    iterators = [iter(list(enumerate(parts))) for _ in chunks]
    with torch.no_grad() if losses is None else nullcontext():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=2,
            seq_length=parts[0]["input_ids"].shape[1] * layout.cp,
            micro_batch_size=1 if layout.packed else 2,
            forward_only=losses is None,
        )
    return outputs


def decided(rows):
    """Values of sequence positions at those that decide the response tokens, padded, and a mask."""
    parts = [row[p - 1 : p + r - 1] for row, (p, r) in zip(rows, LENGTHS, strict=True)]
    lengths = torch.tensor([len(part) for part in parts])
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def surrogate(log_probs, old, weighted, mask, count):
    losses = tw.clipped_surrogate_loss(log_probs, old - 0.1, weighted, mask=mask)
    return tw.weighted_token_mean(losses, mask, count=count)


def trained_on(rank, size, layout):
    """Entropies and weights of every sequence, and this rank's gradients, of one training step."""
    from megatron.core import parallel_state as mpu

    with on_cpu():
        chunks = built(layout)
        batch = Batch(layout, mpu.get_context_parallel_rank())
        model = chunks[0] if len(chunks) == 1 else torch.nn.ModuleList(chunks)
        entropy = "packed_entropy" if layout.packed else "entropy"
        tap = tw.capture_attention(
            model,
            [PROBED],
            packed=layout.packed,
            reduce=lambda captured: getattr(captured, entropy)(kind="raw"),
        )
        cp, pp = mpu.get_context_parallel_group(), mpu.get_pipeline_model_parallel_group()
        with tap as capture:
            log_probs = passed(chunks, layout, batch)
        calls = capture.calls[PROBED]
        assert len(calls) in (0, 2)
        whole_rows = torch.cat(batch.by_sequence(calls, cp)) if calls else None
        entropies = list(held_by_one(whole_rows, group=pp).split([sum(n) for n in LENGTHS]))
        old = torch.cat(batch.by_sequence(log_probs, cp)) if log_probs else None
        old = list(held_by_one(old, group=pp).split([sum(n) for n in LENGTHS]))
        scores, mask = decided(entropies)
        weights = tw.recipe(RECIPE).token_weights(scores, mask, step=STEP)
        products = weights * torch.tensor(ADVANTAGES)[:, None]
        count = mask.sum()

        def loss(number, values):
            """This rank's share of the loss: the tokens that it holds."""
            _, own, starts, _ = batch.parts[number]
            flat, total = values.flatten(), values.sum() * 0
            for row, start in enumerate(starts[:-1], 2 * number):
                prompt, response = LENGTHS[row]
                begin = start + prompt - 1
                mine = (own >= begin) & (own < begin + response)
                if bool(mine.any()):
                    at = own[mine] - begin
                    arguments = flat[mine], old[row][own[mine] - start], products[row][at]
                    valid = torch.ones(1, len(at), dtype=torch.bool)
                    total = total + surrogate(*(a[None] for a in arguments), valid, count)
            return total

        with tap_again(layout, model) as again:
            passed(chunks, layout, batch, loss)
        if again is not None:
            assert len(again.calls[PROBED]) in (0, 2)
        return entropies, weights, gradients(chunks, layout, cp)


def tap_again(layout, model):
    """Under recomputation the tap stays open while a backward pass runs."""
    if layout.recompute is None:
        return nullcontext()
    return tw.capture_attention(model, [PROBED], packed=layout.packed, reduce=lambda _: None)


def gradients(chunks, layout, cp):
    """This rank's gradients, summed over ranks where each has a part, by name, axis and shard."""
    from megatron.core import parallel_state as mpu

    tp, found = mpu.get_tensor_model_parallel_group(), {}
    for model in chunks:
        for name, parameter in global_parameters(model):
            gradient = parameter.grad.clone()
            dist.all_reduce(gradient, group=cp)
            # As megatron's own `finalize_model_grads`.
            if getattr(parameter, "sequence_parallel", False) or re.search("[qk]_layernorm", name):
                if shard(parameter, layout) is None:
                    dist.all_reduce(gradient, group=tp)
            found[name] = gradient, shard(parameter, layout), tp.rank()
    return found
