"""A pytest plugin that counts the draws of property tests and ends with a given time.

`make fuzz` loads it. The environment names the file for its lines, one for each test, and the time.
"""

import functools
import json
import os
import random
import time
from pathlib import Path

import pytest


class Draws:
    """How often bodies of property tests have run since the last look."""

    def __init__(self):
        self.count = 0

    def counted(self, test):
        """The body of a test, counting its calls."""

        @functools.wraps(test)
        def body(*args, **kwargs):
            self.count += 1
            return test(*args, **kwargs)

        return body

    def taken(self):
        count, self.count = self.count, 0
        return count


draws = Draws()


@pytest.hookimpl(trylast=True)  # after all other tests were left out
def pytest_collection_modifyitems(config, items):
    """Count every draw, and take the files in an order of the seed's own."""
    order = random.Random(config.getoption("hypothesis_seed"))
    places = {path: order.random() for path in sorted({item.path for item in items})}
    items.sort(key=lambda item: places[item.path])
    # Cases of one parametrized test share a handle.
    for handle in {id(item.obj.hypothesis): item.obj.hypothesis for item in items}.values():
        handle.inner_test = draws.counted(handle.inner_test)


def pytest_runtest_logreport(report):
    """Note each test as it ends, since a round may be stopped."""
    if report.when == "call" or report.failed:
        line = {"name": report.nodeid, "draws": draws.taken(), "failed": report.failed}
        note(line)


def note(line):
    with Path(os.environ["FUZZ_LOG"]).open("a") as log:
        log.write(json.dumps(line) + "\n")


def pytest_runtest_logfinish():
    if time.time() > float(os.environ["FUZZ_DEADLINE"]):
        pytest.exit("the time is over", returncode=0)


def pytest_sessionfinish():
    """Draws of a test that was interrupted count as well."""
    if count := draws.taken():
        note({"name": "interrupted", "draws": count, "failed": False})
