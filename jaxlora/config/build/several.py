"""What the processes of a run have in common: checked at its start, and kept by the way."""

import hashlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxlora
from jaxlora.config.schema import Config, defaults, to_dict
from jaxlora.core.tree import leaves
from jaxlora.parallel import exchange
from jaxlora.runs.directory import RunDirectory, default_path
from jaxlora.training.events import Standing, Stop

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "datasets")
"""Those whose versions must be the same everywhere: they decide what is computed, and on what."""


def check_same(config: Config) -> None:
    """Refuses processes that were started with different configs or different code.

    Raises:
        InputError: in all of them; names what differs.
    """
    if exchange.alone():
        return
    exchange.agreed("config", {".".join(path): value for path, value in leaves(to_dict(config))})
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    exchange.agreed("version", {"jaxlora": jaxlora.__version__, "jaxlora's code": _code_digest(), **versions})


def _code_digest() -> str:
    """Of every source file of the package: a version's number says nothing about a checkout."""
    root = Path(jaxlora.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def run_path(workdir: Path | None, config_name: str) -> Path:
    """The run's folder, for all processes: where none is given, its name is the time at process 0."""
    return workdir or Path(exchange.from_first(lambda: str(default_path(config_name))))


def existing_run(path: Path, config: Config) -> RunDirectory | None:
    """The run of a folder that is there; None where there is none yet. Errors as of `open_run`."""
    return open_run(path, config) if exchange.from_first(path.exists) else None


def open_run(path: Path, config: Config) -> RunDirectory:
    """Opens the run's folder: process 0 takes its lock and will write, the others follow.

    Raises:
        InputError: in all processes, whichever of them has something against it.
    """
    opened: list[RunDirectory] = []

    def take() -> list[Any]:
        opened.append(RunDirectory.open(path, to_dict(config), defaults()))
        return [opened[0].record, opened[0].resumed]

    record, resumed = exchange.from_first(take)
    return opened[0] if opened else RunDirectory.follow(path, to_dict(config), record, resumed)


def decided(standing: Standing, verdict: Stop | None) -> Stop | None:
    """What process 0 makes of an evaluation, for all: its verdict, and its standing in place of everyone's.

    Each has the same numbers, but process 0 alone has the files that it compares them with.
    """
    if exchange.alone():
        return verdict
    told = {"standing": standing.to_json(), "stop": vars(verdict) if verdict else None}
    told = exchange.from_first(lambda: told)
    if not exchange.first():
        vars(standing).update(vars(Standing.from_json(told["standing"])))
    return Stop(**told["stop"]) if told["stop"] else None


def outlook(run: RunDirectory) -> Callable[[], str]:
    """Says, once another process has died, from where the same command goes on."""

    def told() -> str:
        entries = run.checkpoints.iterdir() if run.checkpoints.is_dir() else ()
        steps = [int(entry.name) for entry in entries if entry.name.isdecimal()]
        at = f"from step {max(steps):,}" if steps else "from the start: nothing was saved yet"
        return f"The same command goes on {at}, on as many processes as there are."

    return told
