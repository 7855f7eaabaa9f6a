"""The adapter's command in a process whose Ray workers are made to run on the CPU.

Usage: python cpu_run.py PYTHON [OPTION...], PYTHON being the interpreter of the workers.
"""

import os
import sys
import tempfile
from contextlib import contextmanager

import cpu_process

cpu_process.prepare()

import ray  # noqa: E402
import tiny  # noqa: E402
from openrlhf.utils import config as openrlhf_config  # noqa: E402

from tokenweights_openrlhf.train import main as train  # noqa: E402

# What Ray's workers import, but for Ray, which reads their environment when it is imported.
IMPORTS = (
    "torch.distributed.fsdp",
    "deepspeed",
    "transformers",
    "peft",
    "datasets",
    "tokenweights",
)


@contextmanager
def ray_on_cpus(python):
    """A Ray of its own, whose workers run in `python`; it ends and leaves no file behind."""
    paths = os.pathsep.join(tiny.PYTHONPATH)
    with tempfile.TemporaryDirectory(prefix="tw-ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            num_cpus=16,
            num_gpus=16,  # by name only: OpenRLHF's actors ask for one each
            include_dashboard=False,
            object_store_memory=200_000_000,
            # A worker imports torch and DeepSpeed, so none is started before it is asked for.
            _system_config={"prestart_worker_first_driver": False},
            log_to_driver=False,
            _temp_dir=folder,
            runtime_env={
                "py_executable": python,
                "env_vars": cpu_process.ENVIRONMENT | {"PYTHONPATH": paths},
                "worker_process_setup_hook": "cpu_process.prepare",
            },
        )
        try:
            yield
        finally:
            ray.shutdown()


def main(python, *options):
    hierarchize = openrlhf_config.hierarchize

    def with_float32(arguments):
        arguments = hierarchize(arguments)
        arguments.ds.param_dtype = "fp32"  # the command line knows bf16 and fp16 only
        return arguments

    openrlhf_config.hierarchize = with_float32
    with ray_on_cpus(python):
        train([*options])


if __name__ == "__main__":
    main(*sys.argv[1:])
