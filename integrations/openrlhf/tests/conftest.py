"""One Ray for the whole suite, on CPUs, and the actor groups that the tests share."""

import cpu_process
import pytest

cpu_process.prepare()

import cpu_run  # noqa: E402
import tiny  # noqa: E402
from tokenweights_lab.forking import python_with  # noqa: E402


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """One worker holds the shared Ray; at most one other holds that of a command, in test_train."""
    for item in items:
        if "ray_session" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("shared"))


@pytest.fixture(scope="session")
def ray_session():
    with cpu_run.ray_on_cpus(python_with(*cpu_run.IMPORTS)):
        yield


@pytest.fixture(scope="session")
def actors(ray_session):
    """Groups of policy actors by class, ranks and size of the ring, started when asked for."""
    groups: dict = {}

    def group(actor_class, ranks, ring):
        key = (actor_class, ranks, ring)
        if key not in groups:
            groups[key] = tiny.actor_group(*key)
        return groups[key]

    return group


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny.save_policy(folder)
    return str(folder)
