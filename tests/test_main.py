"""The command line itself: help, version, and how any command ends early."""

import os
import subprocess
import sys

import pytest

import tokenweights as tw
from tokenweights.__main__ import COMMANDS, main

PROGRAM = [sys.executable, "-m", "tokenweights"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_there(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and f"usage: tokenweights {command}".rstrip() in printed
    if not command:
        assert all(f"\n    {name} " in printed for name in COMMANDS)


def test_the_version_is_that_of_the_library(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"tokenweights {tw.__version__}\n"


def test_the_module_is_a_program():
    done = subprocess.run([*PROGRAM, "recipes", "full"], capture_output=True, text=True, check=True)
    assert done.stdout == tw.recipe("full").describe() + "\n" and done.stderr == ""


@pytest.mark.parametrize("arguments", [[], ["recipe"], ["recipes", "--yaml"]])
def test_what_does_not_exist_is_a_wrong_use(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage: tokenweights" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_a_command_quietly():
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run([*PROGRAM, "recipes"], stdout=theirs, stderr=subprocess.PIPE, check=False)
    os.close(theirs)
    assert done.returncode == 141 and done.stderr == b""


def test_an_error_is_one_line_that_does_not_steer_the_terminal(capsys):
    assert main(["report", "no\n\x1b[31mfolder"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "\x1b" not in printed and "[31mfolder" in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_is_no_traceback(command, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS[command], "run", interrupted)
    needed = {"inspect": ["model", "--text", "-"], "recipes": []}
    assert main([command, *needed.get(command, ["x"])]) == 130
    assert capsys.readouterr().err == f"tokenweights {command}: interrupted\n"
