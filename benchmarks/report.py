"""Where the benchmarks' figures go: a table on the terminal, and a JSON file that says what they were measured on."""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlora.runs.files import replace

RESULTS = Path(__file__).parent / "results"


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device() -> str:
    """JAX's devices and the machine's cores: "1 x cpu, 2 cores". Starts JAX."""
    import jax

    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} cores"


def facts(command: str, where: str, *packages: str) -> dict[str, Any]:
    """What every file of results begins with.

    Args:
        command: that measured. where: the device, as `device()` says it. packages: whose versions matter.
    """
    return {"command": command, "device": where, "versions": versions(*packages)}


def write(file: Path, told: Mapping[str, Any]) -> None:
    """Writes a file of results, whole or not at all, and its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, (json.dumps(told, indent=2) + "\n").encode())
    print(f"written to {file}", flush=True)


def keep(file: Path, parts: Mapping[str, Any]) -> None:
    """Writes what parts of a benchmark measured into its file, in place of what these parts measured before."""
    write(file, {**(json.loads(file.read_text()) if file.exists() else {}), **parts})


class Report:
    """What a run of a benchmark leaves behind. To be made before anything is timed: it notes the load until then.

    Args:
        name: of the script. arguments: those of `commands.parser`.
    """

    def __init__(self, name: str, arguments: argparse.Namespace):
        self._name, self._arguments = name, arguments
        self._load = [round(value, 2) for value in os.getloadavg()]

    def write(self, where: str, packages: Sequence[str], results: Any, suffix: str = "", **more: Any) -> None:
        """Writes the figures, to `--out` or to the results' folder; those of a toy only to `--out`.

        Args:
            where: the device, as `device()` says it. packages: whose versions matter. results: the figures.
            suffix: of the file's name, where a script measures several things. more: what else there is to say of them.
        """
        kind = where.split(" x ")[-1].split(",")[0].lower().replace(" ", "-")
        out = self._arguments.out or (
            None if self._arguments.toy else RESULTS / f"{self._name}-{kind}{suffix}.json"
        )
        if out is None:
            return
        command = shlex.join(["python", "-m", f"benchmarks.{self._name}", *sys.argv[1:]])
        told = facts(command, where, *packages) | {"load_before": self._load}
        write(out, told | more | {"results": results})


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints rows under a header: the first column to the left, the others to the right."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip(), flush=True)
