"""python benchmarks/paper COMMAND: see `cli.py`."""

import sys
from pathlib import Path

# The folder itself would hide modules of the standard library behind its own.
sys.path[0] = str(Path(__file__).parents[1])

from paper.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
