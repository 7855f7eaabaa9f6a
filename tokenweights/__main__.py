"""The command line: `python -m tokenweights inspect`, `report` and `compare`."""

import argparse
import sys
from collections.abc import Sequence

from tokenweights._errors import TokenWeightsError
from tokenweights.commands import compare, inspect, report

COMMANDS = {"inspect": inspect, "report": report, "compare": compare}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status, 2 if something was wrong with the input."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenweights",
        description="Look at token weights: at one response, at a whole run, or at several.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").splitlines()[0]
        added = commands.add_parser(name, help=summary, description=summary)
        command.add_arguments(added)
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except (TokenWeightsError, OSError) as error:
        print(f"{parser.prog} {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
