"""Makes a process run OpenRLHF on the CPU: what calls for CUDA gets a stand-in, and no op is built.

Everything else is OpenRLHF's and DeepSpeed's own: actors, strategy, ZeRO, losses, replay buffer.
A module is changed when it is imported, so that a process pays for no module that it does not need.
"""

import importlib.abc
import importlib.util
import os
import sys

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


def without_cuda(torch):
    torch.cuda.current_device = lambda: Cpu("cpu")
    for name in ("set_device", "synchronize", "empty_cache", "current_stream"):
        setattr(torch.cuda, name, lambda *_, **__: None)


def without_shared_memory(communication):
    communication.build_shm_op = lambda: None  # it would be compiled


def with_float32(utils):
    stock = utils.convert_to_torch_dtype

    def dtype(name):
        import torch

        return torch.float32 if name == "fp32" else stock(name)

    utils.convert_to_torch_dtype = dtype


def with_plain_adam(strategy):
    stock_mesh, stock_config = strategy.init_device_mesh, strategy.get_train_ds_config
    strategy.init_device_mesh = lambda _, *args, **kwargs: stock_mesh("cpu", *args, **kwargs)

    def config(*args, **kwargs):
        made = stock_config(*args, **kwargs)
        if "optimizer" in made:
            made["optimizer"]["params"]["torch_adam"] = True  # the fused one would be compiled
        return made

    strategy.get_train_ds_config = config


CHANGES = {
    "torch": without_cuda,
    "deepspeed.comm.torch": without_shared_memory,
    "openrlhf.utils.utils": with_float32,
    "openrlhf.utils.deepspeed.deepspeed": with_plain_adam,
}


class Changed(importlib.abc.MetaPathFinder):
    """Finds the modules of `CHANGES`, each once, and changes them after they have run."""

    def find_spec(self, name, path, target=None):
        change = CHANGES.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


def prepare():
    os.environ |= ENVIRONMENT
    sys.meta_path.insert(0, Changed())
    for name in CHANGES.keys() & sys.modules.keys():
        CHANGES.pop(name)(sys.modules[name])
