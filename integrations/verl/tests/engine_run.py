"""One rank of an engine test: VeRL's own training worker on the embedded policy, on a CPU.

Usage: python engine_run.py RANK WORLD_SIZE FOLDER CASE...
"""

import json
import sys
from functools import partial

import cpu_flash
import tokenweights as tw
import torch
from batches import CASES, CLASSES, LAYERS, PREPLAN, ROWS, batch, rows
from tokenweights.recipes.signals import AttentionEntropy
from tokenweights_lab import policy_path
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
)
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig
from verl.workers.utils.losses import ppo_loss

from tokenweights_verl.engine import PROBE, TokenWeightsTrainingWorker


def training_worker(
    cls,
    *,
    strategy,
    remove_padding=True,
    dynamic=True,
    bucket=None,
    lora=0,
    attention="sdpa",
    sequence_ranks=1,
    dropout=0.0,
    lr=0.0,
    precision="fp32",
    offload=False,
    fused=False,
):
    torch.manual_seed(0)  # of adapters
    model = HFModelConfig(
        path=str(policy_path()),
        override_config={"attn_implementation": attention, "attention_dropout": dropout},
        use_remove_padding=remove_padding,
        enable_gradient_checkpointing=True,
        lora_rank=lora,
        target_modules=["q_proj", "v_proj"],
        use_fused_kernels=fused,
        fused_kernel_options={"impl_backend": "torch"},
    )
    engine = FSDPEngineConfig(
        strategy=strategy,
        use_dynamic_bsz=dynamic,
        max_token_len_per_gpu=160,
        infer_max_token_len_per_gpu=160,
        micro_batch_size_per_gpu=2,
        infer_micro_batch_size_per_gpu=2,
        ulysses_sequence_parallel_size=sequence_ranks,
        mixed_precision={"param_dtype": precision, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        use_torch_compile=False,
        param_offload=offload,
        optimizer_offload=offload,
        pad_to_length=bucket is not None,
        pad_to_length_bucket=bucket or 1024,
    )
    worker = cls(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=engine,
            optimizer_config=FSDPOptimizerConfig(lr=lr, clip_grad=1e9),
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    actor = FSDPActorConfig(
        strategy=strategy,
        rollout_n=1,
        ppo_mini_batch_size=ROWS,
        ppo_micro_batch_size_per_gpu=2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        loss_agg_mode="token-mean",
        use_dynamic_bsz=dynamic,
        optim=FSDPOptimizerConfig(lr=lr),
    )
    return worker, partial(ppo_loss, config=actor)


def own_rows(worker, data):
    ranks, rank = worker.engine.get_data_parallel_size(), worker.engine.get_data_parallel_rank()
    return data.clone(), list(range(rank, ROWS, ranks))


def inference(worker, probe):
    data, own = own_rows(worker, batch())
    data = tu.index_select_tensor_dict(data, own)
    tu.assign_non_tensor(data, temperature=1.0, calculate_entropy=True, compute_loss=False)
    if probe is not None:
        tu.assign_non_tensor_data(data, PROBE, probe)
    output = worker.infer_batch(data)
    if output is None:
        return None
    outputs = {
        key: [row.clone() for row in value.unbind()]
        for key, value in output.items()
        if isinstance(value, torch.Tensor)
    }
    return {"rows": own, **outputs}


def gradient_norm(worker, loss, advantages, seen=None):
    pairs = rows()
    old = [torch.full((len(response),), -1.0) for _, response in pairs]
    data, own = own_rows(worker, batch(advantages=advantages, old_log_probs=old))
    data = tu.index_select_tensor_dict(data, own)

    def recorded(model_output, data, dp_group=None):
        if seen is not None:
            parts = zip(data["row"].tolist(), data["advantages"].unbind(), strict=True)
            seen.extend((row, part.clone()) for row, part in parts)
        return loss(model_output=model_output, data=data, dp_group=dp_group)

    worker.set_loss_fn(recorded)
    tu.assign_non_tensor(
        data,
        temperature=1.0,
        calculate_entropy=False,
        global_batch_size=ROWS,
        mini_batch_size=ROWS,
        epochs=1,
        seed=1,
        dataloader_kwargs={"shuffle": True},
    )
    output = worker.train_mini_batch(data)
    return None if output is None else float(tu.get(output, "metrics")["grad_norm"][0])


def case_results(options):
    worker, loss = training_worker(TokenWeightsTrainingWorker, **options)
    plain, plain_loss = training_worker(TrainingWorker, **options)
    lengths = [len(response) for _, response in rows()]
    signs = [1.0 if row % 2 else -1.0 for row in range(ROWS)]
    uniform = [torch.full((n,), sign) for n, sign in zip(lengths, signs, strict=True)]
    # Weights that name row and place, so a mix-up cannot go unseen.
    named = [
        sign * (row + torch.arange(n) / 100)
        for row, (n, sign) in enumerate(zip(lengths, signs, strict=True))
    ]
    first = [sign * (torch.arange(n) < n // 2) for n, sign in zip(lengths, signs, strict=True)]
    share = sum(lengths) / sum(n // 2 for n in lengths)
    seen, preplan = [], tw.with_head_classes(tw.recipe(PREPLAN), CLASSES)
    return {
        "probed": inference(worker, AttentionEntropy(layers=LAYERS)),
        "columns": inference(worker, preplan.attention),
        "unprobed": inference(worker, None),
        "plain": inference(plain, None),
        "norm": gradient_norm(worker, loss, uniform),
        "plain_norm": gradient_norm(plain, plain_loss, uniform),
        "named_norm": gradient_norm(worker, loss, named, seen),
        "selected_norm": gradient_norm(worker, loss, [part * share for part in first]),
        "seen": seen,
        "engines": (type(worker.engine).__name__, type(plain.engine).__name__),
    }


def main(rank, ranks, folder, *cases):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=int(ranks)
    )
    cpu_flash.register()
    results = {case: case_results(CASES[case]) for case in cases}
    torch.save(results, f"{folder}/rank{rank}.pt")
    print(json.dumps(list(results)))


if __name__ == "__main__":
    main(*sys.argv[1:])
