"""The command line: `tokenweights`, or `python -m tokenweights`, with a command behind it."""

import argparse
import os
import sys
from collections.abc import Sequence

from tokenweights import __version__
from tokenweights._errors import TokenWeightsError
from tokenweights.commands import check, compare, inspect, recipes, report
from tokenweights.commands.terminal import shown

COMMANDS = {
    "recipes": recipes,
    "check": check,
    "inspect": inspect,
    "report": report,
    "compare": compare,
}
# What a shell says of a program that was interrupted, and of one that nobody reads any more.
INTERRUPTED, UNREAD = 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status, 2 if something was wrong with the input."""
    parser = argparse.ArgumentParser(
        prog="tokenweights",
        description="Look at token weights: at recipes and models, at one response, at a whole "
        "run, or at several.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").splitlines()[0]
        added = commands.add_parser(name, help=summary, description=summary)
        command.add_arguments(added)
    options = parser.parse_args(arguments)
    try:
        status = COMMANDS[options.command].run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except KeyboardInterrupt:
        print(f"{parser.prog} {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (TokenWeightsError, OSError) as error:
        print(shown(f"{parser.prog} {options.command}: {error}"), file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
