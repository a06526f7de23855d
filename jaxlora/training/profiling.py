"""A trace of a few steps of a run, for TensorBoard's profile plugin (docs/profile.md)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import jax

T = TypeVar("T")


class Profile:
    """Traces a run's steps, from the first that it makes of a range to the range's last.

    The numbers of the run are the same with and without. A step that is made again, after a rollback, is traced only
    where the trace still runs.

    Args:
        steps: to trace; empty for none.
        folder: TensorBoard's folder of the run; the trace goes to `plugins/profile/<time>/` in it.
        say: takes a line for the person.
        stage: opens a stretch of work that the person sees.
    """

    def __init__(
        self,
        steps: range,
        folder: Path,
        say: Callable[[str], None],
        stage: Callable[[str], AbstractContextManager[object]],
    ):
        self._steps, self._folder, self._say, self._stage = steps, folder, say, stage
        self._first: int | None = None  # that was traced
        self._last = 0
        self._over = not steps

    def __call__(self, step: int, make: Callable[[], T]) -> T:
        """Makes a step, traced where it is its turn.

        Args:
            step: its number.
            make: gives the device the step; returns its arrays.
        Returns:
            What `make` does.
        """
        if self._first is None and not self._over and step in self._steps:
            self._start(step)
        if not self._tracing or step not in self._steps:
            return make()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            made = make()
        self._last = step
        return made

    def seen(self, step: int) -> None:
        """Takes the number of each step whose results the host has: the last one to trace is made by then.

        To wait for it earlier would hand the time of two steps to one of them, and none to the other.
        """
        if self._tracing and step == self._steps[-1]:
            self._stop()

    @property
    def _tracing(self) -> bool:
        return self._first is not None and not self._over

    @contextmanager
    def open(self) -> Iterator["Profile"]:
        """While open, steps can be traced; a trace that still runs at the end is written then."""
        try:
            yield self
            if self._first is None and not self._over:
                self._say(f"not profiled: the run did not come to step {self._steps[0]}")
        finally:
            if self._tracing:
                self._stop()

    def _start(self, step: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of the interpreter would slow down what is measured
        try:
            jax.profiler.start_trace(self._folder, profiler_options=options)
        except Exception as error:  # whatever it is, the run needs no profile
            self._give_up(error)
            return
        self._first = step

    def _stop(self) -> None:
        self._over = True
        with self._stage("writing the profile"):
            try:
                jax.profiler.stop_trace()
            except Exception as error:
                self._give_up(error)
                return
        named = f"step {self._last}" if self._first == self._last else f"steps {self._first} to {self._last}"
        self._say(f"profile of {named}: xprof --logdir {self._folder} shows it (docs/profile.md)")

    def _give_up(self, error: Exception) -> None:
        self._over = True
        why = (str(error).splitlines() or [type(error).__name__])[0]
        self._say(f"not profiled: {why}")
