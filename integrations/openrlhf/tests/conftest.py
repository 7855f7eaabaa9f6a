"""One Ray for the whole suite, on CPUs, and the actor groups that the tests share."""

import os
import shutil
import tempfile

import cpu_process
import pytest

cpu_process.prepare()

import ray  # noqa: E402
import tiny  # noqa: E402


@pytest.fixture(scope="session")
def ray_session():
    folder = tempfile.mkdtemp(prefix="tw-ray-")
    ray.init(
        num_cpus=16,
        num_gpus=16,  # by name only: OpenRLHF's actors ask for one each
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200_000_000,
        _temp_dir=folder,
        runtime_env={
            "env_vars": cpu_process.ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(tiny.PYTHONPATH)},
            "worker_process_setup_hook": "cpu_process.prepare",
        },
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def actors(ray_session):
    """Groups of policy actors by class and number of ranks, started when first asked for."""
    groups: dict = {}

    def group(actor_class, ranks):
        key = (actor_class, ranks)
        if key not in groups:
            groups[key] = tiny.actor_group(actor_class, ranks)
        return groups[key]

    return group


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny.save_policy(folder)
    return str(folder)
