"""The machine a number was measured on."""

import platform
from pathlib import Path


def processor() -> str:
    """The model name of the CPU, as far as the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
