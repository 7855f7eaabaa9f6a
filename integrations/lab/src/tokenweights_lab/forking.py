"""A `python` whose programs begin with their imports made: they are forked from one that made them.

A trainer's imports take ten seconds of a processor, and a Ray starts nine processes that need them.
The executable asks the server for a process with its arguments, environment, folder and streams,
hands on what signals it, and ends as that process does. It forks scripts and modules (`-m`), and
runs what else an interpreter is asked for in a real one.

Usage: python forking.py serve ADDRESS MODULE..., python forking.py run ADDRESS ARGUMENT...
"""

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

STREAMS = (0, 1, 2)
FORKABLE = ("jemalloc_bg_thd",)  # pyarrow's allocator starts this thread again in the child


@cache
def python_with(*modules: str) -> str:
    """The path of such an executable, whose server ends with this process; of any outside Linux."""
    if sys.platform != "linux":
        return sys.executable
    folder = tempfile.TemporaryDirectory(prefix="python")  # short: it holds a socket
    address, executable = f"{folder.name}/socket", Path(folder.name, "python")
    server = subprocess.Popen(
        [sys.executable, "-u", __file__, "serve", address, *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(folder.cleanup)
    atexit.register(server.communicate)  # closes its standard input, on which it ends
    assert server.stdout and "ready\n" in server.stdout, f"no server with {modules}"
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" run {address} "$@"')
    executable.chmod(0o755)
    return str(executable)


def serve(address: str, *modules: str) -> None:
    """Forks what is asked for until standard input ends."""
    del sys.path[0]  # this folder
    for module in modules:
        importlib.import_module(module)
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("[0-9]*/comm")}
    threads -= {Path("/proc/self/comm").read_text().strip(), *FORKABLE}
    assert not threads, f"a process with other threads cannot be forked: {threads}"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        print("ready")
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with those who ask
        while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
            client, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                break
            client.close()
        else:
            return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with client:
        _, streams, _, _ = socket.recv_fds(client, 1, len(STREAMS))
        with client.makefile() as request:
            wish = json.loads(request.readline())
        if program := os.fork():
            keep(program, client)
    os.setsid()  # what the terminal signals, the client hands on
    for own, stream in zip(streams, STREAMS, strict=True):
        os.dup2(own, stream)
        os.close(own)
    os.environ.clear()
    os.environ.update(wish["environment"])
    os.chdir(wish["folder"])
    begin(*wish["arguments"])


def begin(*arguments: str) -> None:
    """What `python ARGUMENT...` does with a script or a module."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if arguments[0] == "-m":
        sys.path[:0], sys.argv = [os.getcwd(), *paths], [*arguments[1:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[:0], sys.argv = [str(Path(arguments[0]).parent), *paths], [*arguments]
        runpy.run_path(arguments[0], run_name="__main__")


def keep(program: int, client: socket.socket) -> None:
    """Tells the client who runs its program and how that ended; kills what nobody waits for."""
    client.sendall(f"{program}\n".encode())
    ended = os.pidfd_open(program)
    if ended not in select.select([ended, client], [], [])[0]:
        os.kill(program, signal.SIGKILL)
    _, status = os.waitpid(program, 0)
    with suppress(OSError):
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def run(address: str, *arguments: str) -> int:
    """The exit code of a program that the server forks."""
    if arguments[:1] == ("-u",):  # as the server is
        arguments = arguments[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] != "-m"):
        os.execv(sys.executable, [sys.executable, "-u", *arguments])
    wish = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b" "], STREAMS)
        server.sendall(json.dumps(wish).encode() + b"\n")
        with server.makefile() as answers:
            program = int(answers.readline())
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda number, _: os.kill(program, number))
            code = int(answers.readline())
    if code < 0:
        with suppress(OSError):  # that of SIGKILL cannot be set
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    else:
        sys.exit(run(*sys.argv[2:]))
