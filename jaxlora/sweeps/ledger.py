"""sweep.json: what a sweep knows beyond its trials' own folders, so that the same command goes on as it would have."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlora.core.errors import InputError
from jaxlora.runs.directory import CONFIG
from jaxlora.runs.files import LOCK, encode_json, replace
from jaxlora.sweeps.trials import Trial

FILE, RUNGS = "sweep.json", ".rungs"  # no trial is called so


class Ledger:
    """The file, read once and replaced whole at each change; keys of others are left as they are.

        trials    name -> what differs from the base config
        stacks    a list of names each: the trials that are trained together, in the order of their slots
        rungs     "STACK/RUNG" (both numbers) -> {"step": the last step made before it was decided,
                  "dropped": name -> {"rung", "step", "reason"}}
        sweep     what the command was asked for
        waves     of a search: name -> what differs, of each wave's trials

    Args:
        folder: the sweep's, there already.
    Raises:
        InputError: the file is no JSON.
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
            self._write("trials", known | told)

    @property
    def stacks(self) -> list[list[str]]:
        """The trials of each stack."""
        return self._read().get("stacks", [])

    def add_stacks(self, stacks: Sequence[Sequence[str]]) -> None:
        """Notes stacks that are about to be trained."""
        self._write("stacks", [*self.stacks, *map(list, stacks)])

    def rung(self, stack: int, number: int) -> dict[str, Any] | None:
        """What was decided at a rung; None where nothing was."""
        return self._read().get("rungs", {}).get(f"{stack}/{number}")

    def decide(self, stack: int, number: int, step: int, dropped: Mapping[str, Mapping[str, Any]]) -> None:
        """Notes who is dropped at a rung."""
        rungs = self._read().get("rungs", {})
        self._write("rungs", rungs | {f"{stack}/{number}": {"step": step, "dropped": dropped}})

    def keep_judged(self, name: str, step: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Keeps what a trial was dropped on, for the ranking: its record knows only its own calendar's evaluations.

        Args:
            columns: "example", "nll", "tokens", as in the files of eval/.
        """
        folder = self._file.parent / RUNGS
        folder.mkdir(exist_ok=True)
        replace(folder / f"{name}.json", encode_json({"step": step, "columns": columns}))

    @property
    def dropped(self) -> dict[str, dict[str, Any]]:
        """Name -> {"rung", "step", "reason", "made"} of every trial that was dropped; `made` as a rung's step."""
        rungs = self._read().get("rungs", {}).values()
        return {
            name: {**facts, "made": rung["step"]} for rung in rungs for name, facts in rung["dropped"].items()
        }

    def get(self, key: str, default: Any = None) -> Any:
        """What was noted under a key."""
        return self._read().get(key, default)

    def note(self, key: str, value: Any) -> None:
        """Notes something under a key, in place of what was there."""
        self._write(key, value)

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._file.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise InputError(
                f"{self._file} is not valid JSON ({error}); restore it, or give another --workdir."
            ) from error

    def _write(self, key: str, value: Any) -> None:
        replace(self._file, encode_json(self._read() | {key: value}, indent=2))


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
