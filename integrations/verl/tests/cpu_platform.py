"""VeRL on CPUs, for tests: a platform, its own FSDP engine for it, and two refusals undone.

VeRL imports this module in every process that has `ENVIRONMENT`.
"""

import logging
import os
from contextlib import nullcontext
from functools import partialmethod, wraps
from pathlib import Path
from types import SimpleNamespace

import torch

ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "cpu_platform",
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    ),
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# What VeRL imports, but for Ray, which reads the environment of its workers when it is imported.
IMPORTS = (
    *("torch._dynamo", "torch.distributed.fsdp", "transformers", "tensordict", "peft", "datasets"),
    *("aiohttp", "fastapi", "hydra", "tokenweights.adapters", "tokenweights_lab"),
)

from verl.plugin.platform import PlatformBase, PlatformRegistry  # noqa: E402


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "any"
    device_module = SimpleNamespace(
        max_memory_allocated=lambda: 0,
        max_memory_reserved=lambda: 0,
        memory_allocated=lambda: 0,
        memory_reserved=lambda: 0,
        mem_get_info=lambda: (0, 1),
        empty_cache=lambda: None,
        synchronize=lambda: None,
        is_available=lambda: True,
        set_device=lambda index: None,
        current_device=lambda: "cpu",
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        manual_seed=torch.manual_seed,
        get_device_name=lambda: "CPU",
        ipc_collect=lambda: None,
    )

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    def manual_seed_all(self, seed):
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg):
        return nullcontext()

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "GPU"

    def ray_noset_envvars(self):
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None


def _undo_refusals():
    import torch.distributed.fsdp._init_utils as fsdp

    # FSDP1 synchronizes states over gloo well enough, and refuses only for the sake of speed.
    fsdp._check_module_states_for_sync_module_states = lambda module_states: None
    # A reference policy is offloaded to pinned memory, which only an accelerator has a use for.
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor
    init_process_group = torch.distributed.init_process_group

    def init(backend=None, **options):
        # VeRL asks for "cpu:gloo,cpu:gloo", one part for the host and one for the device.
        return init_process_group("gloo" if "gloo" in str(backend) else backend, **options)

    torch.distributed.init_process_group = init


def _copy_what_is_kept():
    from verl.utils import fsdp_utils

    save = fsdp_utils.fsdp2_sharded_save_to_cpu

    @wraps(save)
    def copied(model):
        # VeRL keeps older weights by moving them to the CPU, where these already are.
        state, spec = save(model)
        return {name: (tensor.clone(), own) for name, (tensor, own) in state.items()}, spec

    fsdp_utils.fsdp2_sharded_save_to_cpu = copied


def _ask_more_often():
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    # For a rollout of half a second VeRL would wait two seconds.
    ReplayBuffer.__init__ = partialmethod(ReplayBuffer.__init__, poll_interval=0.1)


def _register_engine():
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    if "cpu" in EngineRegistry._engines["language_model"]["fsdp"]:
        return  # imported a second time, under another name, to look for doctests
    EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cpu")(FSDPEngineWithLMHead)


if os.environ.get("VERL_PLATFORM") == "cpu":
    _undo_refusals()
    _copy_what_is_kept()
    _ask_more_often()
    _register_engine()
    import cpu_rollout

    cpu_rollout.register()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
