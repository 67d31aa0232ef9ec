"""How benchmarks tell what they have measured."""

import json
import os
import platform
import subprocess
from typing import Any


def tell(benchmark: str, **figures: Any) -> None:
    """One JSON line, with the machine and the commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = f"{platform.machine()} {os.cpu_count()} cores"
    print(json.dumps({"benchmark": benchmark, **figures, "machine": machine, "commit": commit.stdout.strip()}))
