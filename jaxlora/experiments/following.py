"""Runs that are read again and again while they go on: only what has changed, and what is new about it."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxlora.experiments.findings import nats
from jaxlora.experiments.log import Entry
from jaxlora.experiments.records import CONFIG, METRICS, NOTES, RECORD, Run, read_run
from jaxlora.experiments.telling import extreme, latest, lines

_Signature = tuple[tuple[int, int] | None, ...]


class Reader:
    """Reads run folders, and those that have not changed since the last time not again."""

    def __init__(self, read: Callable[[Path], Run] = read_run):
        self._read = read
        self._known: dict[Path, tuple[_Signature, Run]] = {}

    def __call__(self, folder: Path) -> Run:
        signature = _signature(folder)
        known = self._known.get(folder)
        if known is None or known[0] != signature:
            known = self._known[folder] = signature, self._read(folder)
        return known[1]


class News:
    """What is new about runs since it was last asked."""

    def __init__(self) -> None:
        self._told: dict[Path, tuple[tuple[str, ...], tuple[str, ...]]] = {}

    def __call__(self, entries: Sequence[Entry]) -> list[tuple[str, list[str]]]:
        """(run's name, lines) of each run that is new or has gone on: where it is, and what was not said before.

        A verdict that changes because the baseline has gone on is no news of the run.
        """
        first, found = not self._told, []
        for entry in entries:
            told = tuple(line.text for line in lines(entry))
            own = (state(entry.run), *entry.notes)
            before = self._told.get(entry.run.path)
            if before is None:
                if not first:
                    found.append((entry.run.name, [*told, own[0]]))
            elif before[0] != own:
                found.append((entry.run.name, [own[0], *(text for text in told if text not in before[1])]))
            self._told[entry.run.path] = own, told
        return found


def state(run: Run) -> str:
    """ "running: step 340 of 1,000, train nll 0.81, eval nll 1.23 (lowest 1.22 at step 300)"."""
    planned = run.planned_steps
    parts = [f"step {run.steps:,}" + (f" of {planned:,}" if planned and planned != run.steps else "")]
    if (train := latest(run.train, "train/nll")) is not None:
        parts.append(f"train nll {nats(train)}")
    best, last = extreme(run.eval, "eval/nll"), latest(run.eval, "eval/nll")
    if best and last is not None:
        lowest = f" (lowest {nats(best[1])} at step {best[0]:,})" if best[1] < last else ""
        parts.append(f"eval nll {nats(last)}{lowest}")
    return f"{(run.status or 'not known to run').replace('_', ' ')}: {', '.join(parts)}"


def _signature(folder: Path) -> _Signature:
    found: list[tuple[int, int] | None] = []
    for name in (CONFIG, RECORD, METRICS, NOTES):
        try:
            stat = os.stat(folder / name)
            found.append((stat.st_mtime_ns, stat.st_size))
        except OSError:
            found.append(None)
    return tuple(found)
