"""The adapter's command in a process whose Ray workers are made to run on the CPU."""

import os
import tempfile

import cpu_process

cpu_process.prepare()

import ray  # noqa: E402
import tiny  # noqa: E402
from openrlhf.utils import config as openrlhf_config  # noqa: E402
from tokenweights_openrlhf.train import main as train  # noqa: E402


def start_ray(folder):
    ray.init(
        num_cpus=16,
        num_gpus=16,  # by name only: OpenRLHF's actors ask for one each
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
        _temp_dir=folder,
        runtime_env={
            "env_vars": cpu_process.ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(tiny.PYTHONPATH)},
            "worker_process_setup_hook": "cpu_process.prepare",
        },
    )


def main(options):
    hierarchize = openrlhf_config.hierarchize

    def with_float32(arguments):
        arguments = hierarchize(arguments)
        arguments.ds.param_dtype = "fp32"  # the command line knows bf16 and fp16 only
        return arguments

    openrlhf_config.hierarchize = with_float32
    with tempfile.TemporaryDirectory(prefix="tw-ray-") as folder:
        start_ray(folder)
        try:
            train(options)
        finally:
            ray.shutdown()
