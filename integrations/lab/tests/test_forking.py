"""Programs forked from a process with imports run as started ones do."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tokenweights_lab.forking import python_with

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
    paths.mkdir()
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


def test_a_module_and_a_line_run_too(python, tmp_path):
    def printed(*arguments, **more):
        command = [python, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, **more).stdout

    (tmp_path / "beside.py").write_text("import sys\nprint(__name__, *sys.argv[1:])\n")
    assert printed("-m", "beside", "a", "-m") == "__main__ a -m\n"
    assert printed("-u", "beside.py", "-u") == "__main__ -u\n"
    assert printed("-c", "print(6 * 7)") == "42\n"
    assert printed("-", input="print(6 * 7)") == printed(input="print(6 * 7)") == "42\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_program_ends_with_the_one_that_waits_for_it(python, tmp_path, number):
    (tmp_path / "script.py").write_text(SLEEPS)
    command = [python, tmp_path / "script.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as waits:
        program = int(waits.stdout.readline())
        assert program != waits.pid
        waits.send_signal(number)
        assert waits.wait() == -number
        waits.stdout.read()  # until nobody can write any more
    for _ in range(100):
        if not os.path.exists(f"/proc/{program}"):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the program outlived its end")
