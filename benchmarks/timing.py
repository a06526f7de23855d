"""What the benchmarks share: sides that are timed in turn, what they ran on, and where the figures go."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlora.runs.files import replace

RESULTS = Path(__file__).parent / "results"


# ---- timing ---------------------------------------------------------------------------------------------------


def in_turn(
    sides: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each side in each round, after a round that is not counted; who goes first alternates.

    A side has to wait for what it started: `jax.block_until_ready`.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            began = clock()
            sides[name]()
            if turn:
                taken[name].append(clock() - began)
    return taken


def spread(values: Iterable[float]) -> dict[str, float]:
    """The median and the range."""
    found = sorted(values)
    return {"median": statistics.median(found), "least": found[0], "most": found[-1]}


def ratios(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """Median and range, over the rounds, of one side's value over the other's in the same round."""
    return spread(a / b for a, b in zip(of, to, strict=True))


def shown(found: Mapping[str, float], digits: int = 2, unit: float = 1.0) -> str:
    """ "1.52 (1.48-1.60)": a `spread`, in units of `unit`."""
    median, least, most = (f"{found[key] / unit:,.{digits}f}" for key in ("median", "least", "most"))
    return f"{median} ({least}-{most})"


# ---- the command ----------------------------------------------------------------------------------------------


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """A benchmark's arguments: those that all of the measuring ones have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--rounds", type=positive, default=rounds, help=f"how often each side is timed ({rounds})"
    )
    made.add_argument(
        "--toy", action="store_true", help="sizes for a test: seconds, and figures without meaning"
    )
    made.add_argument("--out", type=Path, metavar="F.json", help="where the figures go (benchmarks/results)")
    return made


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def choices(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """An argument that is some of the allowed names, with commas between them."""
    names = tuple(allowed)

    def some(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in names:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(names)}")
        return chosen

    return some


def absent(**packages: str) -> str | None:
    """The line that says what to install for a peer; None where all of it is there.

    Args:
        packages: what is imported -> what pip calls it.
    """
    missing = [wanted for name, wanted in packages.items() if importlib.util.find_spec(name) is None]
    return f"not installed, so not measured: pip install {' '.join(missing)}" if missing else None


# ---- results --------------------------------------------------------------------------------------------------


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


class Report:
    """What a run of a benchmark leaves behind. To be made before anything is timed: it notes the load until then.

    Args:
        name: of the script. arguments: those of `parser`.
    """

    def __init__(self, name: str, arguments: argparse.Namespace):
        self._name, self._arguments = name, arguments
        self._load = [round(value, 2) for value in os.getloadavg()]

    def write(self, where: str, used: Mapping[str, str], results: Any, **more: Any) -> None:
        """Writes the figures, to `--out` or to the results' folder; those of a toy only to `--out`.

        Args:
            where: the device, as `device()` says it. used: `versions`. results: the figures.
            more: what else there is to say of them.
        """
        kind = (
            "cpu"
            if "cpu" in where.lower()
            else where.split(" x ")[-1].split(",")[0].lower().replace(" ", "-")
        )
        out = self._arguments.out or (None if self._arguments.toy else RESULTS / f"{self._name}-{kind}.json")
        if out is None:
            return
        told = {
            "command": shlex.join(["python", "-m", f"benchmarks.{self._name}", *sys.argv[1:]]),
            "device": where,
            "load_before": self._load,
            "versions": dict(used),
            **more,
            "results": results,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        replace(out, (json.dumps(told, indent=2) + "\n").encode())
        print(f"written to {out}")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints rows under a header: the first column to the left, the others to the right."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [f"{cell:<{width}}" if not at else f"{cell:>{width}}" for at, (cell, width) in
                 enumerate(zip(line, widths, strict=True))]  # fmt: skip
        print("  ".join(cells).rstrip(), flush=True)
