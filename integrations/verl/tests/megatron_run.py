"""One rank of a Megatron test: VeRL's own engine class on a tiny GPT of megatron-core, on a CPU.

VeRL builds an engine with a bridge of its own to megatron-core, with DDP and an optimizer, for
GPUs; here the engine gets its model and settings by hand, and does everything from a batch on.

Usage: python megatron_run.py RANK WORLD_SIZE FOLDER CASE...
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[3] / "tests"))
from capture.megatron_cpu import on_cpu
from capture.megatron_ranks import PROBED, Layout, built, sequences
from tokenweights.recipes.signals import AttentionEntropy

CASES = {
    "packed": Layout(tp=2, sp=True, cp=2, packed=True),
    "padded": Layout(tp=2, cp=2),
    "pipeline": Layout(tp=2, pp=2, packed=True),
    "virtual pipeline": Layout(pp=2, chunks=2, packed=True),
}


def engine(layout):
    from transformers import Qwen3Config
    from verl.workers.config import McoreEngineConfig

    from tokenweights_verl.megatron import TokenWeightsMegatronEngine

    made = TokenWeightsMegatronEngine.__new__(TokenWeightsMegatronEngine)
    made.module = built(layout, variable_seq_lengths=True, calculate_per_token_loss=False)
    made.tf_config, made.enable_routing_replay = made.module[0].config, False
    made.engine_config = McoreEngineConfig(
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=layout.cp,
        pipeline_model_parallel_size=layout.pp,
        use_remove_padding=layout.packed,
    )
    made.model_config = SimpleNamespace(
        hf_config=Qwen3Config(architectures=["Qwen3ForCausalLM"]),
        tokenizer=SimpleNamespace(pad_token_id=0),
        mtp=SimpleNamespace(enable=False, enable_train=False),
        model_type="language_model",
    )
    return made


def batch(probed):
    from verl.utils import tensordict_utils as tu

    rows = sequences()
    ids = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    masks = torch.nested.as_nested_tensor([torch.ones(len(r)) for r in rows], layout=torch.jagged)
    data = tu.get_tensordict(
        {"input_ids": ids, "position_ids": ids, "loss_mask": masks},
        {"use_dynamic_bsz": True, "max_token_len_per_gpu": 20, "temperature": 1.0},
    )
    tu.assign_non_tensor(data, calculate_entropy=True)
    data["temperature"] = torch.ones(len(rows))
    if probed:
        signal = AttentionEntropy(layers=(PROBED, 0), entropy_kind="raw")
        tu.assign_non_tensor_data(data, "attention_probe", signal)
    return data


def run(case):
    from megatron.core import parallel_state as mpu

    made, found = engine(CASES[case]), {}
    for name, probed in (("probed", True), ("plain", False)):
        with torch.no_grad():
            output = made.infer_batch(batch(probed))
        if mpu.is_pipeline_last_stage(ignore_virtual=True):
            outputs = output["model_output"]
            found[name] = {key: list(value.unbind()) for key, value in outputs.items()}
        else:
            assert output == {}
    return found


if __name__ == "__main__":
    rank, ranks, folder, *cases = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=int(ranks)
    )
    torch.set_num_threads(1)
    with on_cpu():
        saved = {case: run(case) for case in cases}
    torch.save(saved, f"{folder}/rank{rank}.pt")
