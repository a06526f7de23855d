"""Where a run's numbers go: metrics.jsonl at once, TensorBoard (through CLU) from a thread of its own.

CLU imports TensorFlow, which takes seconds. The thread therefore does it, and only when there is a first number to
write: by then the step is compiled, and the training loop never waits for it. What comes before is queued.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlora.core.tree import leaves
from jaxlora.runs.directory import RunDirectory
from jaxlora.runs.files import replacing

# TensorFlow reads these when it is imported, and would otherwise say on stderr which instructions the machine has.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

_Call = Callable[[Any], object]


class Writers:
    """Writes a run's curves, hyperparameters and texts.

    TensorBoard is a view of the run, not a part of it: when it cannot be written, `problems` says so and the run goes
    on; metrics.jsonl has everything.

    Args:
        run: the run folder. When it was truncated for a resume, TensorBoard is told to drop the later steps too.
    """

    def __init__(self, run: RunDirectory):
        self._run = run
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()  # None ends the thread
        self._thread: threading.Thread | None = None
        self._closed = False
        self._problems: list[str] = []
        self._hparams: _Call | None = None

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line to metrics.jsonl, and its numbers to TensorBoard.

        Args:
            step: optimizer steps done.
            values: name -> value, as `RunDirectory.append_metrics` takes them.
        """
        self._run.append_metrics(step, values)
        numbers = {name: float(value) for name, value in values.items() if not isinstance(value, str | None)}
        self._put(lambda writer: writer.write_scalars(int(step), numbers))

    def hparams(self, config: Mapping[str, Any]) -> None:
        """Shows the config in TensorBoard's HParams tab, keys joined by dots; lists and None as text."""
        flat = {".".join(path): _shown(value) for path, value in leaves(config)}
        self._hparams = lambda writer: writer.write_hparams(flat)
        if self._run.writes:
            self._queue.put(self._hparams)  # no number yet: not worth starting the thread

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Shows texts (Markdown) in TensorBoard."""
        self._put(lambda writer: writer.write_texts(int(step), texts))

    def forget(self, after_step: int) -> None:
        """Has TensorBoard forget the later steps, for a run that goes back there; metrics.jsonl is not touched."""
        self._put(lambda _: _Reopen(after_step))
        if self._hparams is not None:
            self._put(self._hparams)

    def flush(self) -> None:
        """Waits until TensorBoard's files hold all that was written so far."""
        if not self._run.writes:
            return
        written = threading.Event()
        self._put(lambda writer: writer.flush())
        self._put(lambda _: written.set())
        written.wait()

    def close(self) -> None:
        """Writes what is left and ends the thread; nothing may be written after."""
        if self._closed:
            return
        self._closed = True
        if self._thread is not None or not self._queue.empty():
            self._put(None)
            assert self._thread is not None
            self._thread.join()

    def problems(self) -> list[str]:
        """What could not be written since the last call, one line each."""
        found, self._problems = self._problems, []
        return found

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, call: _Call | None) -> None:
        if not self._run.writes:
            return
        self._queue.put(call)
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, args=(self._run.resumed_after,), name="tensorboard"
            )
            self._thread.start()

    def _work(self, resumed_after: int | None) -> None:
        writer = self._opened(resumed_after)
        # Not a daemon, which would be torn out of TensorFlow at exit; so it watches for the end of the program itself.
        while threading.main_thread().is_alive() or not self._queue.empty():
            try:
                call = self._queue.get(timeout=0.5)
            except queue.Empty:
                continue
            if call is None:
                break
            outcome = self._guarded(call, writer)
            if isinstance(outcome, _Reopen):
                # Files are read in the order of their names, and a file that was left is not looked at again.
                self._guarded(lambda writer: writer.close(), writer)
                writer = self._opened(outcome.after_step)
            if self._queue.empty():
                self._guarded(lambda writer: writer.flush(), writer)
        self._guarded(lambda writer: writer.close(), writer)

    def _opened(self, after_step: int | None) -> Any:
        return self._guarded(lambda _: _open(self._run, after_step), None) or _Nowhere()

    def _guarded(self, call: _Call, writer: Any) -> Any:
        try:
            return call(writer)
        except Exception as error:  # whatever it is, the curves are in metrics.jsonl
            problem = f"TensorBoard's files in {self._run.tensorboard} could not be written ({error})"
            if problem not in self._problems:
                self._problems.append(problem)
            return None


def compare_in_tensorboard(
    folder: Path, differing: Mapping[str, Iterable[Any]], metrics: Sequence[str]
) -> None:
    """Has TensorBoard's HParams tab over a folder of runs show what differs, and these metrics first.

    Without it the tab shows every key of the config and every metric, which is the same and too wide.

    Args:
        folder: with a run in each of its folders; `tensorboard --logdir FOLDER` shows them.
        differing: name of each hyperparameter that differs -> its values.
        metrics: names of scalars.
    """
    from tensorboard.plugins.hparams import summary_v2 as hparams

    domains = {name: _domain(list(values)) for name, values in differing.items()}
    summary = hparams.hparams_config_pb(
        [hparams.HParam(name, hparams.Discrete(values)) for name, values in domains.items()],
        [hparams.Metric(name) for name in metrics],
    )
    _write_events(folder / "events.out.tfevents.0.sweep", time.time(), {"summary": summary})


def _domain(values: list[Any]) -> list[Any]:
    """The different values as TensorBoard shows them, in order, all of one type."""
    shown = [_shown(value) for value in values]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in shown):
        return sorted({float(value) for value in shown})
    return (
        sorted(set(shown))
        if all(isinstance(value, bool) for value in shown)
        else sorted({str(v) for v in shown})
    )


class _Reopen(NamedTuple):
    """What a call returns to go on in new files, which tell TensorBoard to forget the steps after this one."""

    after_step: int


class _Nowhere:
    """Stands in for the writer that could not be opened; that it could not is told once."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_: None


def _open(run: RunDirectory, after_step: int | None) -> Any:
    import tensorflow as tf
    from clu import metric_writers

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices(
            [], kind
        )  # before TensorFlow's first operation would claim them from JAX
    _mark_session(run, after_step or 0)
    return metric_writers.SummaryWriter(os.fspath(run.tensorboard))


def _mark_session(run: RunDirectory, after_step: int) -> None:
    """Marks a new session: at every mark but the first, TensorBoard forgets the steps from there on.

    So the curves of a run that was killed, and repeats some steps, show each step once.
    """
    from tensorboard.compat.proto import event_pb2

    # The files are read in the order of the second in their names, so this one must have a later second.
    seconds = [int(file.name.split(".")[3]) for file in run.tensorboard.glob("events.out.tfevents.*")]
    patience = time.monotonic() + 2
    while time.monotonic() < patience and any(second >= int(time.time()) for second in seconds):
        time.sleep(0.05)
    now = time.time()
    run.tensorboard.mkdir(parents=True, exist_ok=True)
    protos: Any = event_pb2  # made at run time, so that type checkers see nothing in it
    start = protos.SessionLog(status=protos.SessionLog.START)
    # Nothing after the second: so it is read before the file that the writer begins in the same second, whose name
    # goes on with the host, the process and a count.
    _write_events(
        run.tensorboard / f"events.out.tfevents.{int(now):010d}",
        now,
        {"step": after_step + 1, "session_log": start},
    )


def _write_events(file: Path, wall_time: float, content: Mapping[str, Any]) -> None:
    """Writes an event file that holds one event; TensorFlow, which `EventFileWriter` would load, is not needed."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    protos: Any = event_pb2  # made at run time, so that type checkers see nothing in it
    with replacing(file) as stream:
        records = RecordWriter(stream)
        for fields in ({"file_version": "brain.Event:2"}, content):
            records.write(protos.Event(wall_time=wall_time, **fields).SerializeToString())


def _shown(value: Any) -> bool | int | float | str:
    """As TensorBoard's hyperparameters can be: lists and None as text."""
    if isinstance(value, bool | int | float | str):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
