"""sweep.json: what a sweep knows beyond its trials' own folders, so that the same command goes on as it would have."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlora.core.errors import InputError
from jaxlora.runs.directory import CONFIG
from jaxlora.runs.files import LOCK, encode_json, replace
from jaxlora.sweeps.trials import Trial

FILE, RUNGS = "sweep.json", ".rungs"  # no trial is called so


class Waiting(NamedTuple):
    """A trial at a rung, until those that did not fit beside it are there too.

    Attributes:
        rung: its number, from 1.
        step: its own. made: the last step that its stack made.
        columns: "example", "nll", "tokens" of the evaluation there, as in the files of eval/.
    """

    rung: int
    step: int
    made: int
    columns: Mapping[str, Sequence[Any]]


class Ledger:
    """The file, read once and replaced whole at each change; keys of others are left as they are.

        trials    name -> what differs from the base config
        stacks    a list of names each: the trials that are trained together, in the order of their slots
        cohorts   a list of numbers each: the stacks whose trials are compared with each other
        rungs     "STACK/RUNG" (numbers; the first of the stacks that were compared) -> {"dropped": name ->
                  {"rung", "step", "made": the last step that its stack made, "reason"}}
        sweep     what the command was asked for
        waves     of a search: name -> what differs, of each wave's trials

    Args:
        folder: the sweep's, there already.
    Raises:
        InputError: the file is no JSON; or, of what notes something, a file cannot be written.
    """

    def __init__(self, folder: Path):
        self._file = folder / FILE
        self._read()

    def remember(self, trials: Sequence[Trial]) -> None:
        """Notes trials.

        Raises:
            InputError: one of that name is another.
        """
        known = self._read().setdefault("trials", {})
        told = {trial.name: json.loads(encode_json(trial.changes)) for trial in trials}
        for name, changes in told.items():
            if known.get(name, changes) != changes:
                raise InputError(
                    f"{self._file} has a trial {name} with {known[name]}, and now it is {changes}: that is another "
                    "sweep.\nGive another --workdir."
                )
        if not told.keys() <= known.keys():
            self._write(trials=known | told)

    @property
    def stacks(self) -> list[list[str]]:
        """The trials of each stack."""
        return self._read().get("stacks", [])

    @property
    def cohorts(self) -> list[list[int]]:
        """The numbers of stacks whose trials are compared with each other."""
        return self._read().get("cohorts", [])

    def cohort(self, stack: int) -> list[int]:
        """The numbers of the stacks whose trials are compared with those of this one, which is among them."""
        return next(cohort for cohort in self.cohorts if stack in cohort)

    def add_stacks(self, stacks: Sequence[Sequence[str]]) -> None:
        """Notes stacks that are about to be trained, and whose trials will be compared with each other."""
        first = len(self.stacks)
        numbers = list(range(first, first + len(stacks)))
        self._write(stacks=[*self.stacks, *map(list, stacks)], cohorts=[*self.cohorts, numbers])

    def rung(self, cohort: Sequence[int], number: int) -> Mapping[str, Mapping[str, Any]] | None:
        """Who was dropped at a rung, as `decide` was told; None where nothing was decided."""
        decided = self._read().get("rungs", {}).get(f"{cohort[0]}/{number}")
        return None if decided is None else decided["dropped"]

    def decide(self, cohort: Sequence[int], number: int, dropped: Mapping[str, Mapping[str, Any]]) -> None:
        """Notes who of some stacks is dropped at a rung.

        Args:
            dropped: name -> {"rung", "step", "made", "reason"}.
        """
        rungs = self._read().get("rungs", {})
        self._write(rungs=rungs | {f"{cohort[0]}/{number}": {"dropped": dropped}})

    def wait(self, name: str, waiting: Waiting) -> None:
        """Notes that a trial has come to a rung, where others are still to come."""
        _put(self._waiting(name), encode_json(waiting._asdict()))

    def waiting(self, name: str) -> Waiting | None:
        """Where a trial waits, or did when it was killed; None for one that does not."""
        try:
            return Waiting(**json.loads(self._waiting(name).read_bytes()))
        except FileNotFoundError:
            return None

    def end_wait(self, name: str) -> None:
        """Forgets that a trial waits: it was decided upon."""
        self._waiting(name).unlink(missing_ok=True)

    def _waiting(self, name: str) -> Path:
        return self._file.parent / RUNGS / "waiting" / f"{name}.json"

    def keep_judged(self, name: str, step: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Keeps what a trial was dropped on, for the ranking: its record knows only its own calendar's evaluations.

        Args:
            columns: "example", "nll", "tokens", as in the files of eval/.
        """
        _put(self._file.parent / RUNGS / f"{name}.json", encode_json({"step": step, "columns": columns}))

    @property
    def dropped(self) -> dict[str, dict[str, Any]]:
        """Name -> what `decide` was told, of every trial that was dropped."""
        rungs = self._read().get("rungs", {}).values()
        return {name: facts for rung in rungs for name, facts in rung["dropped"].items()}

    def get(self, key: str, default: Any = None) -> Any:
        """What was noted under a key."""
        return self._read().get(key, default)

    def note(self, key: str, value: Any) -> None:
        """Notes something under a key, in place of what was there."""
        self._write(**{key: value})

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._file.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise InputError(
                f"{self._file} is not valid JSON ({error}); restore it, or give another --workdir."
            ) from error

    def _write(self, **changed: Any) -> None:
        _put(self._file, encode_json(self._read() | changed, indent=2))


def _put(file: Path, content: bytes) -> None:
    """What a sweep decided must be on the disk before anybody acts on it: without, it cannot go on."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace(file, content)
    except OSError as error:
        raise InputError(
            f"{file} could not be written ({error.strerror}).\nMake room, and repeat the command: every trial goes on "
            "after its newest whole checkpoint."
        ) from error


def judged(folder: Path, name: str) -> tuple[int, dict[str, list[Any]]] | None:
    """The step and the columns that `Ledger.keep_judged` kept of a trial in a sweep's folder; None for none."""
    try:
        kept = json.loads((folder / RUNGS / f"{name}.json").read_bytes())
    except (OSError, ValueError):
        return None
    return kept["step"], kept["columns"]


def check_is_sweep_or_empty(folder: Path) -> None:
    """Refuses a folder that holds something else.

    Raises:
        InputError: naming what it holds.
    """
    if not folder.exists() or (folder / FILE).exists():
        return
    others = sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK)
    if others:
        what = "holds a run, not a sweep" if CONFIG in others else "is not empty and holds no sweep"
        raise InputError(f"{folder} {what} (it has {', '.join(others[:3])}): give another --workdir")
