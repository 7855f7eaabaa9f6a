"""Makes a process run OpenRLHF on the CPU: what calls for CUDA gets a stand-in, and no op is built.

Everything else is OpenRLHF's and DeepSpeed's own: actors, strategy, ZeRO, losses, replay buffer.
"""

import contextlib
import os

ENVIRONMENT = {
    "CI": "1",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
    "TQDM_DISABLE": "1",
}


class Cpu(str):
    """The device `cpu`, which numbers itself 0."""

    def __format__(self, spec):
        return "0"


def prepare():
    os.environ |= ENVIRONMENT
    import deepspeed.comm.torch
    import torch

    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: Cpu("cpu")
    for name in ("set_device", "synchronize", "empty_cache", "current_stream"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    deepspeed.comm.torch.build_shm_op = lambda: None

    import openrlhf.utils.deepspeed.deepspeed as strategy
    import openrlhf.utils.utils as utils
    from torch.distributed.device_mesh import init_device_mesh

    strategy.init_device_mesh = lambda _, *args, **kwargs: init_device_mesh("cpu", *args, **kwargs)
    stock_dtype, stock_config = utils.convert_to_torch_dtype, strategy.get_train_ds_config
    utils.convert_to_torch_dtype = lambda name: (
        torch.float32 if name == "fp32" else stock_dtype(name)
    )

    def train_config(*args, **kwargs):
        config = stock_config(*args, **kwargs)
        with contextlib.suppress(KeyError):
            config["optimizer"]["params"]["torch_adam"] = True  # the fused one would be compiled
        return config

    strategy.get_train_ds_config = train_config
