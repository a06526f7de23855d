"""What benchmarks of whole commands share: a timed command, and a results file that keeps what other parts measured."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlora.runs.files import replace

RESULTS = Path(__file__).parent / "results"


def timed(command: str, words: Sequence[str], cache: Path | None = None) -> float:
    """Seconds of `python -m jaxlora.COMMAND` from start to end.

    Args:
        cache: the folder of its caches, that of compilations among them; None for the person's own.
    Raises:
        subprocess.CalledProcessError: it ended with another code than 0.
    """
    environment = os.environ | ({"XDG_CACHE_HOME": str(cache)} if cache else {})
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", f"jaxlora.{command}", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - began


def keep(file: Path, part: str, command: str, device: str, results: Any) -> None:
    """Writes what a part of a benchmark measured into its file, in place of what that part measured before."""
    told = json.loads(file.read_text()) if file.exists() else {}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    told[part] = {
        "command": command,
        "device": f"{device}, {os.cpu_count()} cores",
        "versions": versions,
        "results": results,
    }
    replace(file, (json.dumps(told, indent=2) + "\n").encode())
