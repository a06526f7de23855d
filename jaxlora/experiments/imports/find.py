"""Where runs that were made elsewhere lie, and which reader takes them."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from jaxlora.core.errors import InputError
from jaxlora.experiments.imports.board import is_board, read_board
from jaxlora.experiments.imports.table import is_table, read_tables
from jaxlora.experiments.imports.trainer import is_trainer_run, read_trainer
from jaxlora.experiments.records import Run, find_runs, is_run, read_run

FORMATS: Mapping[str, tuple[Callable[[Path], bool], str]] = {
    "jaxlora": (is_run, "config.json and metrics.jsonl"),
    "transformers": (is_trainer_run, "trainer_state.json, or checkpoint-N/trainer_state.json"),
    "tensorboard": (is_board, "events.out.tfevents.*"),
    "csv": (is_table, "a .csv with a column of steps"),
}
"""Format -> whether a path is such a run, and by what it is known."""


def read_all(
    roots: Iterable[str | os.PathLike[str]],
    only: str = "",
    progress: Callable[[int, int], None] | None = None,
    read: Callable[[Path], Run] = read_run,
) -> list[Run]:
    """Every run at and under the roots, of whatever format; never raises for a broken one.

    Args:
        roots: folders, and CSV files.
        only: one of `FORMATS`, "" for all.
        progress: takes (runs read, runs found).
        read: reads a run folder of ours.
    Raises:
        InputError: an unknown format, a root that is not there, or no run under any.
    """
    if only and only not in FORMATS:
        raise InputError(
            f"--format {only}: known are {', '.join(FORMATS)}; leave it out to take what is there."
        )
    places = [Path(root) for root in roots]
    for place in places:
        if not place.exists():
            raise InputError(f"there is no {place}: give the folder that holds your runs, or a run's own.")
    found: dict[str, list[Path]] = {name: [] for name in FORMATS}
    found["jaxlora"] = find_runs(place for place in places if place.is_dir())
    for place in places:
        for name, path in _elsewhere(place):
            if path not in found[name]:
                found[name].append(path)
    if only:
        found = {name: paths if name == only else [] for name, paths in found.items()}
    count = sum(map(len, found.values()))
    if not count:
        raise InputError(_nothing(places, only))
    runs: list[Run] = []
    readers = {"jaxlora": read, "transformers": read_trainer, "tensorboard": read_board}
    for name, reader in readers.items():
        for path in found[name]:
            runs.append(reader(path))
            if progress:
                progress(len(runs), count)
    return runs + read_tables(found["csv"])


def _elsewhere(place: Path) -> Iterator[tuple[str, Path]]:
    """(format, path) of the runs at and under a place that are not ours."""
    if place.is_file():
        if is_table(place):
            yield "csv", place
        return
    for folder, inside, files in os.walk(place):
        here = Path(folder)
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if is_run(here):
            inside[:] = []  # its tensorboard/ is the same run again
        elif is_trainer_run(here):
            yield "transformers", here
            inside[:] = []
        else:
            if is_board(here):
                yield "tensorboard", here
            for name in sorted(files):
                if is_table(here / name):
                    yield "csv", here / name


def _nothing(places: list[Path], only: str) -> str:
    shown = ", ".join(map(str, places[:3])) + (", ..." if len(places) > 3 else "")
    known = {only: FORMATS[only]} if only else FORMATS
    words = "; ".join(f"{name} ({words})" for name, (_, words) in known.items())
    return f"no run in {shown}.\nA run is known by what is in it: {words}."
