"""The benchmarks as commands: their arguments, peers that may be missing, and the timing of jaxlora's own commands."""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.shapes import SHAPES


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


def add_scan(parser: argparse.ArgumentParser) -> None:
    """Adds what writes our layers out, one after the other."""
    parser.add_argument(
        "--no-scan-layers",
        dest="scan_layers",
        action="store_false",
        help="ours with model.scan_layers = False",
    )


def add_step(parser: argparse.ArgumentParser, *shapes: str) -> None:
    """Adds what says which of our train steps is looked at; `shapes` are those of the default."""
    parser.add_argument("--shapes", type=choices(SHAPES), default=list(shapes), help=f"({','.join(shapes)})")
    parser.add_argument("--rows", type=positive, default=4, help="in a step (4)")
    parser.add_argument("--length", type=positive, default=256, help="of a row (256)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--remat", type=choices(("none", "dots", "full")), default=["full"], help="policies (full)"
    )
    add_scan(parser)


def step_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was typed for a parser with `add_step`; of a toy, sizes that take seconds."""
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.shapes, arguments.rows, arguments.length = ["toy"], 2, 64
    return arguments


def absent(**packages: str) -> str | None:
    """The line that says what to install for a peer; None where all of it is there.

    Args:
        packages: what is imported -> what pip calls it.
    """
    missing = [wanted for name, wanted in packages.items() if importlib.util.find_spec(name) is None]
    return f"not installed, so not measured: pip install {' '.join(missing)}" if missing else None


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
