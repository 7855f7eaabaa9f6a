"""Runs the property tests again and again, each round from a fresh seed, until the time is over.

Prints how many draws were run and, for every test that failed, the command that fails again.
Usage: python .ci/fuzz.py MINUTES
"""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SUITES = ("tests", "integrations/lab/tests")
PROCESSES = int(os.environ.get("TEST_PROCESSES", "2"))
# One long test, or the shrinking of a failure, may outlast the time; what outlasts this hangs.
GRACE_SECONDS = 600
PASSED, FAILED, INTERRUPTED = 0, 1, (2, -signal.SIGINT)


def command(seed: int) -> list[str]:
    """A pytest run of all property tests: hypothesis draws constants of every file it has read."""
    options = ["-m", "hypothesis", "--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}"]
    return [sys.executable, "-m", "pytest", *SUITES, *options]


class Round:
    """A pytest process that runs all property tests but the given ones, from a seed of its own."""

    def __init__(self, folder: str, deadline: float, left_out: list[str]):
        self.seed = random.SystemRandom().randrange(2**32)
        self.log, self.output = (Path(folder, f"{self.seed}.{end}") for end in ("jsonl", "txt"))
        plugin = {
            "PYTHONPATH": os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")]),
            "FUZZ_LOG": str(self.log),
            "FUZZ_DEADLINE": str(deadline),
        }
        # Without the flag a file that cannot be read would look like an interruption.
        options = ["--verbose", "-p", "draws", "--continue-on-collection-errors"]
        options += [f"--deselect={test}" for test in left_out]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*command(self.seed), *options],
                env=os.environ | plugin,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def tests(self) -> list[dict]:
        """Name, draws and outcome of each test that has ended."""
        return [json.loads(line) for line in self.log.open()] if self.log.exists() else []

    @property
    def failed(self) -> list[str]:
        """Names of the tests that failed."""
        return [test["name"] for test in self.tests if test["failed"]]

    @property
    def broken(self) -> bool:
        """Whether pytest ended for a reason of its own, or hung."""
        status = self.process.returncode
        return not (status in (PASSED, *INTERRUPTED) or (status == FAILED and self.failed))


def main(minutes: str = "5") -> int:
    """Run rounds side by side and say what came of them; return the exit status."""
    start = time.time()
    deadline = start + 60 * float(minutes)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            running = rounds[:]
            while running or time.time() < deadline:
                for ended in [each for each in running if each.process.poll() is not None]:
                    running.remove(ended)
                    if ended.failed or ended.broken:
                        print(ended.output.read_text(), flush=True)
                    if ended.broken:
                        deadline = time.time()
                while len(running) < PROCESSES and time.time() < deadline:
                    known = [name for each in rounds for name in each.failed]
                    running.append(Round(folder, deadline, known))
                    rounds.append(running[-1])
                if time.time() > deadline + GRACE_SECONDS:
                    for each in running:
                        each.process.kill()
                time.sleep(0.2)
        except KeyboardInterrupt:
            print("interrupted")
            for each in rounds:
                each.process.send_signal(signal.SIGINT)  # nothing happens to one that has ended
                each.process.wait()
        return summary(rounds, time.time() - start)


def summary(rounds: list[Round], seconds: float) -> int:
    """Print totals, and how to repeat each failure; return the exit status."""
    draws = sum(test["draws"] for each in rounds for test in each.tests)
    print(f"{len(rounds)} rounds, {draws} draws, {seconds:.0f} seconds")
    for each in rounds:
        if each.broken:
            print(f"seed {each.seed}: pytest ended with status {each.process.returncode}")
        for name in each.failed:
            test = name.rpartition("::")[2].partition("[")[0]
            print(f"seed {each.seed}: {name} failed, and does again under")
            print(f"  {shlex.join([*command(each.seed), '-k', test])}")
    return int(any(each.failed or each.broken for each in rounds))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
