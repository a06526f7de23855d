"""What a run left behind, read back: its config, its record, its curves.

A folder is read as it lies there, while the run still writes into it, or years after it was killed half way. Nothing in
it raises: what is missing or broken becomes a line of `Run.problems`, and what can be read is read.
"""

import calendar
import gc
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

CONFIG, RECORD, METRICS, NOTES = "config.json", "record.json", "metrics.jsonl", "notes.jsonl"

_INSIDE = {"best", "last", "checkpoints", "eval", "spikes", "tensorboard"}
"""Folders of a run in which no other run lies."""

_SECTIONS = {"model", "data", "lora", "optim", "train"}
"""Sections of a run's config.json: a model's own config.json has none of these objects."""

_NAMED = re.compile(r"(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)\d\d_\d\d-\d\d")
"""How a run that was given no name is called: the day and the minute at which it began."""

_EVENTS = re.compile(r"events\.out\.tfevents\.(\d{9,11})\.")
"""TensorBoard's files have the second at which they were begun in their names."""


@dataclass(frozen=True)
class Curves:
    """What was logged at S different steps.

    Attributes:
        steps: [S] int64, ascending.
        values: name as logged ("train/nll", "eval/nll") -> [S] float64. NaN where it was not logged at that step; a
            number that was logged but not finite is infinite (NaN counts as +inf).
        texts: name -> step -> text, for what was logged in words ("train/spike_kind").
    """

    steps: np.ndarray
    values: Mapping[str, np.ndarray]
    texts: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    def of(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """([n] steps, [n] values) at which a metric was logged; empty where it never was."""
        values = self.values.get(name)
        if values is None:
            return np.zeros(0, np.int64), np.zeros(0)
        there = ~np.isnan(values)
        return (self.steps, values) if there.all() else (self.steps[there], values[there])

    @property
    def last_step(self) -> int:
        """The last step of all, 0 where there is none."""
        return int(self.steps[-1]) if len(self.steps) else 0


NO_CURVES = Curves(np.zeros(0, np.int64), {})


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: the last part of its path; that by which `journal.baseline` finds it.
        path: its folder.
        config: dotted key -> value; only what is known. Lists are tuples.
        record: record.json with the notes of notes.jsonl under "notes", or what an import knows.
        train, eval: what was logged of training, and of evaluations.
        source: "jaxlora", "transformers", "tensorboard" or "csv".
        problems: what is wrong or missing, in a person's words.
        started: when, in seconds since 1970; None where nothing tells.
        written: when the newest of its files was written, likewise.
    """

    name: str
    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    train: Curves = NO_CURVES
    eval: Curves = NO_CURVES
    source: str = "jaxlora"
    problems: tuple[str, ...] = ()
    started: float | None = None
    written: float | None = None

    @property
    def status(self) -> str:
        """What the record says: running, finished, stopped_early, diverged, preempted, failed; "" where none does."""
        return str(self.record.get("status") or "")

    @property
    def steps(self) -> int:
        """The last step that anything is known of."""
        recorded = self.record.get("steps")
        known = int(recorded) if isinstance(recorded, int) else 0
        return max(known, self.train.last_step, self.eval.last_step)

    @property
    def planned_steps(self) -> int | None:
        """The steps that the run was to take, None where neither the record nor the config says."""
        for value in (self.record.get("total_steps"), self.config.get("train.max_steps")):
            if isinstance(value, int | float) and value > 0:
                return int(value)
        return self.steps if self.status == "finished" and self.steps else None

    def number(self, key: str) -> float | None:
        """A config value that is a number; None for one that is not known, or no number."""
        value = self.config.get(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def notes(self) -> tuple[str, ...]:
        """The sentences that a person added, the oldest first."""
        return tuple(str(note["text"]) for note in self.record.get("notes", ()))

    def examples(self, step: int, name: str = "eval") -> Mapping[str, list[Any]] | None:
        """The per-example columns of one evaluation ("example", "nll", "tokens", ...), read when asked for.

        Args:
            step: of the evaluation.
            name: which data: "eval", "train_eval", or "answers" for what was generated.
        Returns:
            Column name -> values; None where there is no such file, or it cannot be read.
        """
        try:
            file = self.path / "eval" / f"{name}-{step:08d}.jsonl"
            rows = [orjson.loads(line) for line in file.read_bytes().splitlines()]
            names = dict.fromkeys(key for row in rows for key in row)
            return {key: [row.get(key) for row in rows] for key in names} or None
        except (OSError, ValueError, TypeError, AttributeError):
            return None


# ---- finding -------------------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run of ours, however little of it is left."""
    if (folder / RECORD).is_file() or (folder / METRICS).is_file():
        return True
    config, _ = read_object(folder / CONFIG)
    return bool(config) and any(isinstance(config.get(section), dict) for section in _SECTIONS)


def find_runs(roots: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The run folders at and under the roots, in the order of their paths; a sweep's folder may hold trials.

    Links to folders are followed once; folders that a run keeps for itself and hidden ones are not looked into.
    """
    found: dict[Path, None] = {}
    seen: set[str] = set()

    def look(folder: Path) -> None:
        real = os.path.realpath(folder)
        if real in seen:
            return
        seen.add(real)
        run = is_run(folder)
        if run:
            found[folder] = None
        try:
            inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        except OSError:
            return
        for name in inside:
            if not name.startswith(".") and not (run and name in _INSIDE):
                look(folder / name)

    for root in roots:
        look(Path(root))
    return list(found)


# ---- reading -------------------------------------------------------------------------------------------------------


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Reads a run folder; a broken one too (see `Run.problems`)."""
    with _no_collection():
        return _read_run(Path(folder))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector looks at thousands of parsed lines again and again, and finds none of them unreachable."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _read_run(path: Path) -> Run:
    problems: list[str] = []
    config, missing = read_object(path / CONFIG)
    problems += [f"{CONFIG}: {missing}"] if missing else []
    record, missing = read_object(path / RECORD)
    problems += [f"{RECORD}: {missing}"] if missing else []
    record = dict(record) | {"notes": read_notes(path, record, problems)}
    rows = _read_lines(path / METRICS, problems, live=record.get("status") == "running")
    train, evaluated = curves(rows)
    return Run(
        name=Path(os.path.abspath(path)).name,
        path=path,
        config=flatten(config),
        record=record,
        train=train,
        eval=evaluated,
        source="jaxlora",
        problems=tuple(problems),
        started=started(path, record),
        written=max((t for f in (METRICS, RECORD, CONFIG) if (t := _modified(path / f))), default=None),
    )


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"learning_rate": 1e-4}} -> {"optim.learning_rate": 1e-4}; lists become tuples."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = tuple(value) if isinstance(value, list) else value
    return flat


def curves(rows: Sequence[Mapping[str, Any]]) -> tuple[Curves, Curves]:
    """Curves of training and of evaluations, from lines as metrics.jsonl has them.

    Args:
        rows: {"step": 500, "train/nll": ...} or {"step": 500, "eval/nll": ...}, in the order written. Of several
            values for one step and name the last counts. What is no number is left out.
    """
    train: list[Mapping[str, Any]] = []
    evaluated: list[Mapping[str, Any]] = []
    for row in rows:
        of_train = "train/nll" in row or any(name.startswith("train/") for name in row)
        (train if of_train else evaluated).append(row)
    return _columns(train), _columns(evaluated)


def _columns(rows: Sequence[Mapping[str, Any]]) -> Curves:
    if not rows:
        return NO_CURVES
    steps = np.array([row["step"] for row in rows], np.int64)
    # Most lines have the same keys: as many sets of keys as there are kinds of lines, not as there are lines.
    names = dict.fromkeys(name for keys in dict.fromkeys(map(tuple, rows)) for name in keys)
    values: dict[str, np.ndarray] = {}
    texts: dict[str, dict[int, str]] = {}
    for name in names:
        beside = name.removesuffix("/nonfinite") in names and name.endswith("/nonfinite")
        if name == "step" or beside:  # the latter is how runs.files.encode_json writes a NaN
            continue
        logged = [row.get(name) for row in rows]
        try:
            column = np.array(logged, np.float64)
        except (ValueError, TypeError, OverflowError):
            column = np.zeros((0, 0))
        if column.ndim != 1:  # not all are numbers: texts, or lists
            column = np.array([v if _is_number(v) else np.nan for v in logged], np.float64)
            texts[name] = {int(step): v for step, v in zip(steps, logged, strict=True) if isinstance(v, str)}
        if f"{name}/nonfinite" in names:
            for index, row in enumerate(rows):
                if which := row.get(f"{name}/nonfinite"):
                    column[index] = -np.inf if which == "-inf" else np.inf
        if not np.isnan(column).all():
            values[name] = column
    if (np.diff(steps) > 0).all():
        return Curves(steps, values, texts)
    ordered, place = np.unique(steps, return_inverse=True)
    merged: dict[str, np.ndarray] = {}
    for name, column in values.items():
        merged[name] = np.full(len(ordered), np.nan)
        there = ~np.isnan(column)
        merged[name][place[there]] = column[there]
    return Curves(ordered, merged, texts)


def read_object(file: Path) -> tuple[Mapping[str, Any], str]:
    """The JSON object of a file, and what is wrong with it: ({}, "is missing")."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}, "is missing"
    except OSError as error:
        return {}, f"could not be read ({error.strerror or error})"
    except (ValueError, RecursionError):
        return {}, "is not valid JSON"
    return (value, "") if isinstance(value, dict) else ({}, "does not hold a JSON object")


def _read_lines(file: Path, problems: list[str], live: bool) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that can be read; says how many can't. A live run's last one may be half written."""
    try:
        content = file.read_bytes()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        problems.append(
            f"{file.name}: {'is missing' if missing else f'could not be read ({error.strerror})'}"
        )
        return []
    lines = content.split(b"\n")
    whole = lines[-1] == b""
    if whole:
        try:  # six times as fast as json, which the loop below needs for NaN and Infinity
            parsed = [orjson.loads(line) for line in lines[:-1]]
            if all(_is_row(row) for row in parsed):
                return parsed
        except ValueError:
            pass
    rows, broken = [], []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and not (live and number == len(lines) and not whole):
            broken.append(number)
    if broken:
        shown = ", ".join(str(number) for number in broken[:5]) + (", ..." if len(broken) > 5 else "")
        count = f"{len(broken):,} line{'s' * (len(broken) > 1)}"
        problems.append(f"{file.name}: {count} could not be read (line{'s' * (len(broken) > 1)} {shown})")
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _is_row(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    step = value.get("step")
    return (type(step) is int or (type(step) is float and step.is_integer())) and abs(step) < 2**63


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if _is_row(value) else None


def read_notes(folder: Path, record: Mapping[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    """The notes of record.json and of notes.jsonl, each once, the oldest first.

    A run that goes on replaces record.json at will, so a note that is made meanwhile lies beside it.
    """
    found: list[Any] = list(record["notes"]) if isinstance(record.get("notes"), list) else []
    try:
        lines = (folder / NOTES).read_bytes().splitlines()
    except OSError:
        lines = []
    broken = 0
    for line in filter(bytes.strip, lines):
        try:
            found.append(json.loads(line))
        except ValueError:
            broken += 1
    if broken:
        problems.append(f"{NOTES}: {broken} line{'s' * (broken > 1)} could not be read")
    notes = {
        (str(note.get("time", "")), str(note["text"])): note
        for note in found
        if isinstance(note, dict) and note.get("text")
    }
    return [notes[key] for key in sorted(notes, key=lambda key: key[0])]


def _modified(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def started(folder: Path, record: Mapping[str, Any]) -> float | None:
    """When a run began, in seconds since 1970: as the first of these says that says anything.

    The record; the names of its event files; its own name (Nov22_10-57), in the year of its files; their date.
    """
    recorded = record.get("started")
    if isinstance(recorded, int | float):
        return float(recorded)
    try:
        events = [_EVENTS.match(entry.name) for entry in os.scandir(folder / "tensorboard")]
    except OSError:
        events = []
    if times := [float(found[1]) for found in events if found]:
        return min(times)
    modified = next((t for name in (CONFIG, METRICS, RECORD) if (t := _modified(folder / name))), None)
    named = _NAMED.match(folder.name)
    try:
        year = time.gmtime(modified).tm_year
        return (
            float(calendar.timegm(time.strptime(f"{year} {named[0]}", "%Y %b%d_%H-%M")))
            if named
            else modified
        )
    except ValueError:  # no such day
        return modified
