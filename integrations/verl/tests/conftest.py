"""VeRL in this process, too, believes in CPUs."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cpu_platform import ENVIRONMENT

os.environ |= {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}
