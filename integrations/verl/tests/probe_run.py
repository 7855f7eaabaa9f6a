"""One rank of a probe test: gradient probes on VeRL's own training worker, on a CPU.

Usage: python probe_run.py RANK WORLD_SIZE FOLDER CASE...
"""

import random
import sys

import cpu_flash
import torch
from batches import CASES, LAYERS, ROWS, batch, plain_advantages
from engine_run import gradient_norm, own_rows, training_worker
from tokenweights.gradients.shards import local_shard
from tokenweights.recipes.signals import AttentionEntropy
from verl.utils import tensordict_utils as tu

from tokenweights_verl.engine import TokenWeightsTrainingWorker
from tokenweights_verl.scores import PROBE


def probed(worker):
    data, own = own_rows(worker, batch(advantages=plain_advantages()))
    data["sample_ids"] = torch.arange(ROWS)
    data = tu.index_select_tensor_dict(data, own)
    tu.assign_non_tensor(data, temperature=1.0, tolerance=None)
    tu.assign_non_tensor_data(data, PROBE, AttentionEntropy(layers=LAYERS))
    return tu.get(worker.gradient_metrics(data), "metrics")


def state(worker):
    tensors = [local_shard(parameter).clone() for parameter in worker.engine.module.parameters()]
    for slots in worker.engine.optimizer.state.values():
        tensors += [local_shard(v).clone() for v in slots.values() if isinstance(v, torch.Tensor)]
    return [*tensors, torch.get_rng_state()], random.getstate()


def trained(options, probes):
    """The state after two training steps, with a probe after each or none, and what was probed."""
    worker, loss = training_worker(TokenWeightsTrainingWorker, lr=1e-3, dropout=0.2, **options)
    torch.manual_seed(1)
    random.seed(1)
    metrics = []
    for _ in range(2):
        gradient_norm(worker, loss, plain_advantages())
        if probes:
            metrics.append(probed(worker))
    parameters = list(worker.engine.module.parameters())
    before = state(worker)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    if probes:
        metrics.append(probed(worker))
    kept = all(bool((local_shard(p.grad) == 1).all()) for p in parameters if p.requires_grad)
    return before, metrics, kept


def case_results(options):
    worker, _ = training_worker(TokenWeightsTrainingWorker, **options)
    begun, _ = state(worker)
    metrics = probed(worker)
    (tensors, python), series, kept = trained(options, True)
    (plain_tensors, plain_python), _, _ = trained(options, False)
    pairs = zip(tensors, plain_tensors, strict=True)
    return {
        "metrics": metrics,
        "series": series,
        "gradients_kept": kept,
        "tensors": len(tensors),
        "moved": any(not torch.equal(a, b) for a, b in zip(begun[:-1], tensors, strict=False)),
        "same": all(torch.equal(a, b) for a, b in pairs) and python == plain_python,
    }


def main(rank, ranks, folder, *cases):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=int(ranks)
    )
    cpu_flash.register()
    torch.save({case: case_results(CASES[case]) for case in cases}, f"{folder}/rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
