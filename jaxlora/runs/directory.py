"""The run folder: what a run leaves behind, and what a repeated command finds there.

    config.json    the resolved config, every key
    record.json    the run's state in a few fields, replaced whole at each change
    metrics.jsonl  one JSON object a line, in the order written
    eval/          per-example losses, a file an evaluation, one JSON object a line
    spikes/        the rows of steps that were spikes or not finite, likewise, a file a step
    tensorboard/   checkpoints/   best/   last/      (written by others; named here)

A process may be killed between any two instructions. Whole files are therefore written aside, synced and renamed;
metrics.jsonl is appended a line at a time, and a half-written last line is cut when the folder is opened again.
Everything is valid JSON; `files.encode_json` says how a NaN is written.
"""

import json
import math
import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlora.core.errors import InputError
from jaxlora.experiments.records import read_notes
from jaxlora.runs.differences import another_config, differing
from jaxlora.runs.files import ASIDE, LOCK, append, encode_json, encode_rows, lock_folder, release, replace

ENDED = ("finished", "stopped_early", "diverged")
"""Statuses of a run that has nothing left to do."""

CONFIG, RECORD, METRICS = "config.json", "record.json", "metrics.jsonl"
_VISIBLE = (
    60  # seconds until a new folder shows on every machine: network file systems remember what was not there
)


def default_path(config_name: str, now: time.struct_time | None = None) -> Path:
    """`runs/<MonDD_HH-MM-SS>_<config>`, the folder of a run that was given none.

    Args:
        config_name: path or name of the config; its stem is used ("configs/qwen05b.py" -> "qwen05b").
        now: local time; the present by default.
    """
    return (
        Path("runs") / f"{time.strftime('%b%d_%H-%M-%S', now or time.localtime())}_{Path(config_name).stem}"
    )


class RunDirectory:
    """One run's folder, held by one process.

    `open` makes or reopens it for writing and takes its lock; `read` looks at one without touching it. A write that
    fails after opening (a full disk) does not end the run: it is kept, tried again with the next write, and listed in
    `problems()`.

    Attributes:
        path: the folder.
        config: the resolved config, as JSON values.
        resumed: whether the folder held this run already.
        resumed_after: the step given to `truncate`, None before.
        writes: whether this process writes into the folder; one of several that does not (see `follow`) keeps the
            record in mind, and no more.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        record: dict[str, Any],
        *,
        resumed: bool,
        lock: int | None,
        writes: bool = True,
    ):
        self.path, self.writes = path, writes
        self.config = config
        self.resumed = resumed
        self.resumed_after: int | None = None
        self._record = record
        self._lock = lock
        self._late: dict[Path, bytes] = {}  # whole files that could not be written yet
        self._late_lines = b""
        self._problems: list[str] = []

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
    ) -> "RunDirectory":
        """Makes the folder for a new run, or reopens that of the same run.

        Args:
            path: the run folder; it and its parents are made when missing.
            config: the resolved config, a nested mapping of JSON values (tuples count as lists).
            defaults: nested like a config: what a key was in a folder that is older than the key.
        Returns:
            The folder, locked by this process until `close` or its end, however it ends.
        Raises:
            InputError: the folder holds a run with another config, or something that is no run; another process
                uses it; or it cannot be written.
        """
        folder = Path(path)
        wanted = json.loads(encode_json(config))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_is_run_or_empty(folder)
            lock = lock_folder(folder)
        except OSError as error:
            raise _unwritable(folder, error) from error
        try:
            return cls._open_locked(folder, wanted, json.loads(encode_json(defaults or {})), lock)
        except OSError as error:
            release(lock)
            raise _unwritable(folder, error) from error
        except BaseException:
            release(lock)
            raise

    @classmethod
    def _open_locked(
        cls, folder: Path, wanted: dict[str, Any], defaults: dict[str, Any], lock: int | None
    ) -> "RunDirectory":
        for leftover in (
            *folder.glob(f"*{ASIDE}"),
            *folder.glob(f"eval/*{ASIDE}"),
            *folder.glob(f"spikes/*{ASIDE}"),
        ):
            leftover.unlink()
        resumed, found = (folder / CONFIG).exists(), wanted
        if resumed:
            found = _read_json(folder / CONFIG)
            differences = list(differing(found, wanted, defaults))
            if differences:
                raise InputError(another_config(folder, differences))
            _cut_half_line(folder / METRICS)
        else:
            _check_is_run_or_empty(folder)
            replace(folder / CONFIG, encode_json(wanted, indent=2))
        record = _read_json(folder / RECORD) if (folder / RECORD).exists() else {}
        run = cls(folder, wanted, record, resumed=resumed, lock=lock)
        if (
            resumed and found != wanted
        ):  # in what may differ; with the first write, since it may be refused yet
            run._late[folder / CONFIG] = encode_json(wanted, indent=2)
        return run

    @classmethod
    def follow(
        cls, path: str | os.PathLike[str], config: Mapping[str, Any], record: dict[str, Any], resumed: bool
    ) -> "RunDirectory":
        """The folder in a process that leaves writing to another one, which has opened it.

        Args:
            path, config: as for `open`.
            record, resumed: what `open` found there.
        Raises:
            InputError: the folder cannot be seen from here.
        """
        folder, wanted = Path(path), json.loads(encode_json(config))
        patience = time.monotonic() + _VISIBLE
        while not (folder / CONFIG).is_file():
            if time.monotonic() > patience:
                raise InputError(
                    f"{folder} is not seen by all processes: give a --workdir on a file system that they share."
                )
            time.sleep(0.1)
        return cls(folder, wanted, record, resumed=resumed, lock=None, writes=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "RunDirectory":
        """Looks at an existing run, finished or still running, without locking or changing it.

        Raises:
            InputError: there is no run in the folder.
        """
        folder = Path(path)
        if not (folder / CONFIG).is_file():
            raise InputError(
                f"{folder} is not a run folder (it has no {CONFIG}): give the folder of a run, runs/NAME"
            )
        record = _read_json(folder / RECORD) if (folder / RECORD).exists() else {}
        return cls(folder, _read_json(folder / CONFIG), record, resumed=True, lock=None)

    @property
    def name(self) -> str:
        """The run's name: the last part of its path."""
        return self.path.resolve().name

    @property
    def best(self) -> Path:
        """The PEFT adapter folder of the best evaluation."""
        return self.path / "best"

    @property
    def last(self) -> Path:
        """The PEFT adapter folder of the last step."""
        return self.path / "last"

    @property
    def checkpoints(self) -> Path:
        """The folder of `runs.checkpoints`."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def evaluations(self) -> Path:
        """The folder of per-example losses."""
        return self.path / "eval"

    @property
    def spikes(self) -> Path:
        """The folder of the rows of spikes."""
        return self.path / "spikes"

    @property
    def record(self) -> dict[str, Any]:
        """A copy of what record.json says."""
        return json.loads(encode_json(self._record))

    def update_record(self, **fields: Any) -> None:
        """Sets fields of record.json and replaces the file; None is a value like any other.

        Notes that a person made meanwhile (`experiments.notes`) come along, under "notes".
        """
        notes = read_notes(self.path, self._record, [])
        fields = {**fields, "notes": notes} if notes else fields
        self._record = {**self._record, **json.loads(encode_json(fields))}
        self._write(self.path / RECORD, encode_json(self._record, indent=2))

    def append_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl: {"step": step, **values}.

        Args:
            step: optimizer steps done when the values were taken.
            values: name -> number (Python, numpy, or a zero-dimensional array), string or bool.
        """
        self._late_lines += encode_json({"step": int(step), **values})
        self._flush_late()

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; a broken one, such as a half-written last one, is left out."""
        try:
            text = (self.path / METRICS).read_bytes()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if _step_of(line) < math.inf]

    def write_evaluation(self, step: int, columns: Mapping[str, Sequence[Any]], name: str = "eval") -> Path:
        """Writes one evaluation's per-example values to eval/<name>-<step>.jsonl.

        Args:
            step: optimizer steps done.
            columns: name -> one value an example, all of one length.
            name: which data was evaluated.
        Returns:
            The file's path.
        Raises:
            ValueError: columns of different lengths.
        """
        file = self.evaluations / f"{name}-{int(step):08d}.jsonl"
        self._write(file, encode_rows(columns))
        return file

    def write_spike(self, step: int, columns: Mapping[str, Sequence[Any]]) -> Path:
        """Writes the rows of a step to spikes/spike-<step>.jsonl; columns and errors as for `write_evaluation`."""
        file = self.spikes / f"spike-{int(step):08d}.jsonl"
        self._write(file, encode_rows(columns))
        return file

    def read_evaluation(self, step: int, name: str = "eval") -> dict[str, list[Any]]:
        """The columns that `write_evaluation` wrote, or is still to write.

        Raises:
            FileNotFoundError: there was no such evaluation.
        """
        file = self.evaluations / f"{name}-{int(step):08d}.jsonl"
        content = self._late.get(file) or file.read_bytes()
        rows = [json.loads(line) for line in content.decode().splitlines()]
        names = dict.fromkeys(key for row in rows for key in row)
        return {key: [row.get(key) for row in rows] for key in names}

    def truncate(self, after_step: int, spikes: Collection[int] = ()) -> None:
        """Drops what was written about steps later than `after_step`, for a run that goes on from there.

        Args:
            after_step: the step.
            spikes: steps whose rows stay in spikes/ all the same: they were gone back from, and won't come again.
        """
        self.resumed_after = after_step
        if not self.writes:
            return

        def stays(file: Path) -> bool:
            step = re.fullmatch(r".*-(\d+)", file.stem)
            return (
                not step
                or int(step[1]) <= after_step
                or (file.parent == self.spikes and int(step[1]) in spikes)
            )

        self._late = {file: content for file, content in self._late.items() if stays(file)}
        waiting = self._late_lines.splitlines(keepends=True)
        self._late_lines = b"".join(line for line in waiting if _step_of(line) <= after_step)
        file = self.path / METRICS
        if file.exists():
            content = file.read_bytes()
            kept = b"".join(
                line for line in content.splitlines(keepends=True) if _step_of(line) <= after_step
            )
            if content.startswith(kept):
                os.truncate(file, len(kept))  # the usual case; works on a full disk too
            else:
                replace(file, kept)
        for file in (*self.evaluations.glob("*.jsonl"), *self.spikes.glob("*.jsonl")):
            if not stays(file):
                file.unlink()

    def problems(self) -> list[str]:
        """What could not be written since the last call, one line each; what is still unwritten is tried again."""
        found, self._problems = self._problems, []
        return found

    def unwritten(self) -> list[Path]:
        """The files whose newest content waits for room, after one more try."""
        self._flush_late()
        return [*self._late, *([self.path / METRICS] if self._late_lines else [])]

    def close(self) -> None:
        """Writes what is left and gives the lock back."""
        self._flush_late()
        release(self._lock)
        self._lock = None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, file: Path, content: bytes) -> None:
        self._late[file] = content
        self._flush_late()

    def _flush_late(self) -> None:
        """Writes all that waits, oldest first. Every write comes through here, so a later one retries the earlier."""
        if not self.writes:
            self._late, self._late_lines = {}, b""
        for file in list(self._late):
            try:
                file.parent.mkdir(exist_ok=True)
                replace(file, self._late[file])
            except OSError as error:
                self._note(file, error)
            else:
                del self._late[file]
        if self._late_lines:
            try:
                append(self.path / METRICS, self._late_lines)
            except OSError as error:
                self._note(self.path / METRICS, error)
            else:
                self._late_lines = b""

    def _note(self, file: Path, error: OSError) -> None:
        problem = f"{file} could not be written ({error.strerror or error}); kept, and tried again with the next write"
        if problem not in self._problems:
            self._problems.append(problem)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise InputError(
            f"{file} is not valid JSON ({error}); restore it, or give another --workdir"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{file} does not hold a JSON object; restore it, or give another --workdir")
    return value


def _step_of(line: bytes) -> float:
    """The step a line of metrics.jsonl is about; later than any for a broken line."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _cut_half_line(file: Path) -> None:
    if file.exists():
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(file, whole)


def _check_is_run_or_empty(folder: Path) -> None:
    if (folder / CONFIG).exists():
        return
    others = sorted(
        entry.name for entry in folder.iterdir() if entry.name != LOCK and not entry.name.endswith(ASIDE)
    )
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise InputError(f"{folder} is not empty and holds no run (it has {shown}): give another --workdir")


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write the run folder {folder} ({error.strerror or error}): give another --workdir"
    )
