"""What a person sees while a command works: a live line on a terminal, plain lines elsewhere, never a long silence.

On a terminal one line at the bottom changes in place and messages scroll above it. Into a file or a pipe go plain
lines, one a log interval. There, whatever lasts (a stage, a compilation, a slow step) says so whenever nothing else
was written for `SILENCE` seconds.
"""

import atexit
import collections
import contextlib
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

SILENCE = 4.5  # seconds after which a plain line says that the work goes on: under five at any time
_WORTH_A_LINE = 1.0  # seconds a stage must have lasted for its time to be told
_INTERVALS = 20  # log intervals whose median gives the time left
_NARROWEST_BAR = 8


class Board(Protocol):
    """What shows several runs at once. Both are called from other threads."""

    def table(self, width: int, height: int) -> Any:
        """What rich draws in the lines that are left."""

    def line(self) -> str:
        """The same as one plain line, for when nothing else was written for long."""
        ...


class Stage:
    """A stretch of work in progress. Call it with (done, total), in any unit, to show the share that is done."""

    def __init__(self, text: str, started: float):
        self.text = text.removesuffix("...").removesuffix("…").rstrip()
        self.started = started
        self.done, self.total = 0.0, 0.0

    def __call__(self, done: float, total: float) -> None:
        """Sets what is done, of how much."""
        self.done, self.total = done, total

    @property
    def share(self) -> str:
        """The share done, "35 %"; empty when unknown."""
        return f"{100 * min(1.0, self.done / self.total):.0f} %" if self.total > 0 else ""


class Progress:
    """Shows a command's stages, training, evaluations, messages and tables.

    Args:
        total_steps: optimizer steps in the run; may be set later.
        interactive: whether to draw on the terminal; None: when the output is one.
        output: where to write; standard output by default.
    """

    def __init__(self, total_steps: int = 0, interactive: bool | None = None, output: IO[str] | None = None):
        self.total_steps = total_steps
        self._output = output or sys.stdout
        if interactive is None:
            interactive = self._output.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self.interactive = interactive
        self._console = Console(file=self._output, force_terminal=interactive, highlight=False)
        self._live: Live | None = None
        self._spinner = Spinner("dots")
        self._lock = threading.RLock()
        self._unprinted: list[tuple[str, str]] = []
        self._printing = False
        self._stages: list[Stage] = []
        self._evaluation: Stage | None = None
        self._facts = ""  # of the last logged step
        self._step: int | None = None  # steps done; None while not training
        self._board: Board | None = None
        self._clock = _StepClock()
        self._last_output = time.monotonic()
        self._closing = threading.Event()
        self._heartbeat: threading.Thread | None = None
        # A thread that still writes when the interpreter goes away would crash it, and a live line hides the cursor.
        atexit.register(self.close)

    def mute(self) -> None:
        """Shows nothing from here on, since another process speaks for this one; nor do libraries there."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None
            self.interactive = False
            self._send_nowhere()

    def say(self, text: str) -> None:
        """Prints a message, above the live line if there is one."""
        with self._lock:
            self._print(text)

    def table(self, title: str, rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> None:
        """Prints rows of cells under a title.

        Args:
            title: one line.
            rows: cells, shown by `str`; the first of each row is its label.
            header: a name for each column; none are shown when empty.
        """
        cells = [[str(cell) for cell in row] for row in rows]
        with self._lock:
            self._print(title, style="bold")
            if self.interactive:
                table = Table(box=None, show_header=bool(header), pad_edge=False, padding=(0, 2, 0, 0))
                for index in range(max((len(row) for row in [header, *cells]), default=0)):
                    table.add_column(
                        header[index] if index < len(header) else "", style="" if index else "dim"
                    )
                for row in cells:
                    table.add_row(*map(Text, row))
                self._console.print(table)
            else:
                lines = [list(header), *cells] if header else cells
                widths = [max(map(len, column)) for column in _columns(lines)]
                for row in lines:
                    padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
                    self._print("  " + "  ".join(padded).rstrip())

    @contextlib.contextmanager
    def stage(self, text: str) -> Iterator[Stage]:
        """Shows that a stretch of work goes on, for how long, and at its end how long it took.

        Args:
            text: what is being done: "loading the base".
        Yields:
            The stage; call it with (done, total) to show a share.
        """
        stage = Stage(text, time.monotonic())
        with self._lock:
            self._stages.append(stage)
            self._clock.pause()
            self._show()
        ended = False
        try:
            yield stage
            ended = True
        finally:
            with self._lock:
                self._stages.remove(stage)
                self._clock.resume()
                seconds = time.monotonic() - stage.started
                if ended and seconds >= _WORTH_A_LINE:
                    self._print(f"{stage.text}: {_elapsed(seconds)}", style="dim")
                self._show()

    def begin(self, step: int = 0) -> None:
        """Training begins, or goes on, after `step` steps."""
        with self._lock:
            self._step, self._facts = step, ""
            self._clock = _StepClock()
            self._show()

    def step(self, step: int) -> None:
        """One more step was handed to the device; cheap, for every step. The first one's compilation ends with it."""
        with self._lock:
            if self._step is None:
                self.begin(step - 1)
            self._step = step
            self._clock.compiled(step)

    def train(
        self,
        step: int,
        *,
        loss: float,
        nll: float,
        learning_rate: float,
        tokens_per_second: float,
    ) -> None:
        """Shows a logged step, and the time left.

        Args:
            step: optimizer steps done.
            loss: the objective, nats per trained token.
            nll: the same without smoothing.
            learning_rate: that of this step.
            tokens_per_second: since the last logged step.
        """
        with self._lock:
            if self._step is None:
                self.begin(step)
            self._end_evaluation()
            self._step = step
            self._clock.logged(step)
            self._facts = (
                f"loss {loss:.3f}  nll {nll:.3f}  lr {learning_rate:.1e}  "
                f"{tokens_per_second:,.{0 if not tokens_per_second < 100 else 1}f} tokens/s"
            )
            if not self.interactive:
                self._print(self._state(step, self._facts))
            self._show()

    def eval(self, done: int, total: int) -> None:
        """Shows how far an evaluation is; call it with done = 0 first, and with done = total at the end."""
        with self._lock:
            if self._evaluation is None:
                self._evaluation = Stage("evaluating", time.monotonic())
                self._clock.pause()
            self._evaluation(done, total)
            if done >= total:
                self._end_evaluation()
            self._show()

    def board(self, board: "Board | None") -> None:
        """Shows a board below everything else from here on; None takes it away."""
        with self._lock:
            self._board = board
            self._show()

    def finish(self) -> None:
        """Training has ended: its line goes away."""
        with self._lock:
            self._end_evaluation()
            self._step = None
            self._show()

    def close(self) -> None:
        """Takes the live line away and ends the threads."""
        with self._lock:
            self._stages.clear()
            self._board = None
            self.finish()
        self._closing.set()
        if self._heartbeat is not None:
            self._heartbeat.join()
        atexit.unregister(self.close)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation = None
            self._clock.resume()

    def _print(self, text: str, style: str = "") -> None:
        self._unprinted.append((text, style))
        if self._printing:
            return  # a signal handler speaks in the middle of a print, which must not be entered twice
        self._printing = True
        try:
            while self._unprinted:
                self._write(*self._unprinted.pop(0))
        finally:
            self._printing = False

    def _write(self, text: str, style: str) -> None:
        self._last_output = time.monotonic()
        try:
            if self.interactive:
                self._console.print(Text(text, style=style), soft_wrap=True)
            else:
                print(text, file=self._output, flush=True)
        except BrokenPipeError:
            # Whoever read the lines (a pager, `head`) is gone. The run is worth more than its lines.
            self._send_nowhere()

    def _send_nowhere(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._output.fileno())

    def _show(self) -> None:
        """Starts or stops what keeps the display alive, as there is something going on or not."""
        busy = bool(self._stages) or any(x is not None for x in (self._evaluation, self._step, self._board))
        if not self.interactive:
            if busy and self._heartbeat is None:
                self._last_output = time.monotonic()
                self._heartbeat = threading.Thread(target=self._beat, name="progress", daemon=True)
                self._heartbeat.start()
        elif busy and self._live is None:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=8, transient=True
            )
            self._live.start()
        elif not busy and self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _beat(self) -> None:
        while not self._closing.wait(0.25):
            with self._lock:
                if time.monotonic() - self._last_output >= SILENCE:
                    self._say_alive()

    def _say_alive(self) -> None:
        stage = self._evaluation or (self._stages[-1] if self._stages else None)
        if stage is not None:
            elapsed = _elapsed(math.floor(time.monotonic() - stage.started))
            self._print(f"{stage.text} ... " + ", ".join(part for part in (stage.share, elapsed) if part))
        elif self._step is not None:
            self._print(self._state(self._step, "..."))
        elif self._board is not None:
            self._print(self._board.line())

    def _render(self) -> Group:
        """The live lines. Called from rich's thread without the lock, which whoever stops that thread may hold."""
        lines: list[Any] = []
        step, evaluation = self._step, self._evaluation
        if step is not None:
            lines.append(self._with_bar(Text(self._state(step, self._facts)), step, self.total_steps))
        for stage in (*self._stages, *([evaluation] if evaluation else [])):
            elapsed = _elapsed(math.floor(time.monotonic() - stage.started))
            text = "  ".join(part for part in (f"{stage.text} ...", stage.share, elapsed) if part)
            line = Table.grid(padding=(0, 1, 0, 0))
            line.add_row(self._spinner, self._with_bar(Text(text), stage.done, stage.total))
            lines.append(line)
        if (board := self._board) is not None:
            lines.insert(0, board.table(self._console.width, self._console.height - len(lines) - 1))
        return Group(*lines)

    def _with_bar(self, text: Text, done: float, total: float) -> Any:
        text.no_wrap, text.overflow = True, "ellipsis"
        room = min(30, self._console.width - text.cell_len - 4)
        if total <= 0 or room < _NARROWEST_BAR:
            return text
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(ProgressBar(total=total, completed=min(done, total), width=room), text)
        return line

    def _state(self, step: int, *facts: str) -> str:
        """ "step 50/400", the facts, and the time left where it is known."""
        counter = f"step {step:>{len(str(self.total_steps))}}/{self.total_steps or '?'}"
        seconds = self._clock.seconds_a_step()
        steps_left = self.total_steps - step
        left = f"{duration(seconds * steps_left)} left" if seconds is not None and steps_left > 0 else ""
        return "  ".join(part for part in (counter, *facts, left) if part)


class _StepClock:
    """Estimates seconds a step: the median over the last log intervals, plus what evaluations and saves add to it.

    Only logged steps are measured, since those wait for the device; the others are merely handed to it. The first
    step is left out, because it compiles, and so are pauses.
    """

    def __init__(self) -> None:
        self._mark: tuple[int, float] | None = None  # the step and time from which the next interval counts
        self._first_step = 0
        self._intervals: collections.deque[float] = collections.deque(maxlen=_INTERVALS)
        self._depth = 0
        self._pause_started = 0.0
        self._paused = 0.0  # since the mark
        self._paused_before = 0.0

    def compiled(self, step: int) -> None:
        if self._mark is None:
            self._mark, self._first_step = (step, time.monotonic()), step
            self._paused = 0.0

    def logged(self, step: int) -> None:
        now = time.monotonic()
        if self._mark is None:
            self.compiled(step)
        elif step > self._mark[0]:
            self._intervals.append((now - self._mark[1] - self._paused) / (step - self._mark[0]))
            self._paused_before += self._paused
            self._mark, self._paused = (step, now), 0.0

    def pause(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._pause_started = time.monotonic()

    def resume(self) -> None:
        if self._depth == 0:
            return  # began before the training did
        self._depth -= 1
        if self._depth == 0:
            self._paused += time.monotonic() - self._pause_started

    def seconds_a_step(self) -> float | None:
        if not self._intervals or self._mark is None:
            return None
        return statistics.median(self._intervals) + self._paused_before / (self._mark[0] - self._first_step)


def _columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    count = max((len(row) for row in rows), default=0)
    return [[row[index] for row in rows if index < len(row)] for index in range(count)]


def _elapsed(seconds: float) -> str:
    """ "2.1 s", "12 s", "3:21"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if isinstance(seconds, float) and seconds < 10 else f"{seconds:.0f} s"
    return duration(seconds)


def duration(seconds: float) -> str:
    """ "0:45", "3:21", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
