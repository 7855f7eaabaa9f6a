"""Programs forked from a process with imports run as started ones do."""

import os
import signal
import subprocess
import sys
import time

import pytest
from forking import python_with

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forking.py reads /proc")

SCRIPT = """
import atexit, os, sys
import beside
atexit.register(lambda: print("end", flush=True))
made = "colorsys" in sys.modules
print(__name__, sys.argv[1:], os.environ["ASKED"], os.getcwd(), sys.stdin.read(), made, flush=True)
print("wrong", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
SLEEPS = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n"


@pytest.fixture(scope="module")
def python():
    return python_with("colorsys")  # a module that nothing else here imports


def test_a_program_has_its_arguments_environment_folder_and_streams(python, tmp_path):
    script, paths = tmp_path / "script.py", tmp_path / "paths"
    script.write_text(SCRIPT)
    (tmp_path / "paths").mkdir()
    (paths / "beside.py").touch()
    done = subprocess.run(
        [python, script, "7", "two words"],
        env=os.environ | {"ASKED": "here", "PYTHONPATH": str(paths)},
        cwd=tmp_path,
        input="in",
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"__main__ ['7', 'two words'] here {tmp_path} in True\nend\n"
    assert (done.returncode, done.stderr) == (7, "wrong\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_program_ends_with_the_one_that_waits_for_it(python, tmp_path, number):
    (tmp_path / "script.py").write_text(SLEEPS)
    command = [python, tmp_path / "script.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as waits:
        program = int(waits.stdout.readline())
        assert program != waits.pid
        waits.send_signal(number)
        assert waits.wait() == (128 + number if number == signal.SIGTERM else -number)
        waits.stdout.read()  # until nobody can write any more
    for _ in range(100):
        if not os.path.exists(f"/proc/{program}"):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the program outlived its end")
