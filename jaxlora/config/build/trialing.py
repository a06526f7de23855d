"""One trial of a sweep: its folder, as if it were trained alone, and what is shown of it."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import jax

from jaxlora.config.build import guarding, memory, programs, running, stacking, wiring, works
from jaxlora.config.build.inputs import Data, Model
from jaxlora.config.build.programs import Programs
from jaxlora.config.schema import Config, defaults, to_dict
from jaxlora.runs.checkpoints import Checkpoints
from jaxlora.runs.directory import RunDirectory
from jaxlora.runs.progress import Progress
from jaxlora.runs.writers import Writers
from jaxlora.sweeps import stack
from jaxlora.sweeps.lockstep import Lane
from jaxlora.sweeps.stack import Stack
from jaxlora.sweeps.trials import Trial
from jaxlora.training.evaluate import Found
from jaxlora.training.events import Stop
from jaxlora.training.state import TrainState
from jaxlora.training.stopping import NLL


class Board(Protocol):
    """What is shown of the trials; every call is cheap."""

    def state(self, name: str, state: str, detail: str = "") -> None:
        """One of "waiting", "compiling", "training", "finished", "stopped_early", "diverged", "dropped", "preempted",
        "failed"."""
        ...

    def step(self, name: str, step: int, total: int) -> None: ...

    def train(self, name: str, **values: Any) -> None: ...

    def evaluated(
        self, name: str, step: int, values: Mapping[str, float], best: Mapping[str, Any] | None
    ) -> None: ...

    def say(self, line: str, name: str = "") -> None: ...


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a trial, as its folder says.

    Attributes:
        status, reason: of its record; "waiting" for one that has not begun.
        step: the last one made.
        best, last: evaluations: {"step", "eval/nll", ...}; None where there is none.
        rung: at which it was dropped, from 1; None for one that was not.
        ended: whether the sweep has nothing left to do for it.
        lost: whether something of it could not be written when it ended.
    """

    status: str
    reason: str
    step: int
    best: dict[str, Any] | None
    last: dict[str, Any] | None
    rung: int | None
    ended: bool = True
    lost: bool = False


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A trial that was checked: its data, its steps, and the adapter that it starts from, if any."""

    trial: Trial
    data: Data
    total: int
    given: Mapping[str, Any] | None


def alone(config: Config) -> Config:
    """The config of the trial as a run of its own."""
    return works.changed(config, "mesh", trial=1)


class _Shown:
    """Shows what `wiring.Shown` is told of one trial on the board, and long stages as those of the sweep."""

    def __init__(self, name: str, total: int, board: Board, progress: Progress):
        self._name, self._total, self._board, self._progress = name, total, board, progress

    def say(self, text: str, /) -> None:
        self._board.say(text, self._name)

    def step(self, step: int, /) -> None:
        self._board.step(self._name, step, self._total)

    def train(self, step: int, /, **values: float) -> None:
        self._board.train(self._name, step=step, **values)

    def eval(self, done: int, total: int, /) -> None:
        self._board.state(self._name, "training", f"evaluating {done / total:.0%}" if done < total else "")

    def stage(self, text: str, /) -> AbstractContextManager[Callable[[float, float], None]]:
        return self._progress.stage(f"{self._name}: {text}")

    def begin(self, step: int, /) -> None:
        self._board.step(self._name, step, self._total)


class OpenTrial:
    """A trial's folder, open, and all that happens in it; a context.

    Args:
        prepared: the trial.
        folder: the sweep's.
        model, base: what is trained upon.
        start: makes first states. fitted: the programs of its stack.
        board, progress: what the person sees.
    Attributes:
        step: made already.
        batch: step -> its batch on the devices. host_batch: likewise on the host.
    """

    def __init__(
        self,
        prepared: Prepared,
        folder: Path,
        model: Model,
        base: Any,
        start: programs.Starter,
        fitted: stacking.Fitted,
        board: Board,
        progress: Progress,
    ):
        self.prepared = prepared
        trial, total = prepared.trial, prepared.total
        self._board, self._name, self._files = board, trial.name, contextlib.ExitStack()
        self._shown = _Shown(trial.name, total, board, progress)
        config = alone(trial.config)
        data = memory.with_eval_rows(prepared.data, fitted.form.config.eval.batch_size)
        facts = wiring.facts(config, model, data)
        self.run = RunDirectory.open(folder / trial.name, to_dict(config), defaults())
        self._files.enter_context(self.run)
        try:
            running.check_same_data(self.run, facts["data"])
            self._checkpoints = self._files.enter_context(
                Checkpoints(self.run.checkpoints, config.checkpoint.keep)
            )
            writers = self._files.enter_context(Writers(self.run))

            def first_state() -> TrainState:
                return start(config, total, prepared.given)

            with progress.stage(f"{trial.name}: making the adapter"):
                self._state, standing = running.gone_on(
                    self.run, self._checkpoints, first_state(), self._shown.say
                )
            self.step = int(self._state.step)
            self.host_batch = guarding.host_batches(config, model, data, standing)
            self._standing, self._ranks = standing, programs.lora_spec(config).ranks
            filled = _filled(fitted)
            self._score = self._scorer(config, model, base, data, filled, fitted.form.config.eval.batch_size)
            evaluator = wiring.evaluator(
                config, self._score, filled.effective, base, fitted.answers, self._shown
            )
            self._ready = running.wired(
                config, model, data, total, self.run, writers, self._checkpoints, standing, facts, evaluator,
                first_state, self._shown,
            )  # fmt: skip
        except BaseException:
            self._files.close()
            raise
        self.batch = self._ready.batch
        events = self._ready.course.events
        events.evaluate.write = self._evaluated
        board.step(trial.name, self.step, total)

    def take_state(self) -> TrainState:
        """The state to go on from; it is not kept."""
        state, self._state = self._state, None
        assert state is not None
        return state

    def lane(self, stack: Stack, rungs: Mapping[int, int], asked_to_leave: Callable[[int], bool]) -> Lane:
        """The trial in its stack."""
        course = dataclasses.replace(self._ready.course, rungs=rungs, asked_to_leave=asked_to_leave)
        return Lane(
            self._name,
            self._ranks,
            course(self.step, lambda: stack.take(self._name, self._ranks)),
            self.prepared.total,
            lambda: bool(self._standing.rollbacks),
            self._ready.rollback,
        )

    def judged(self, stack: Stack) -> Mapping[str, Sequence[Any]]:
        """The nll of the held-out examples, of the newest state; nothing of it is written or remembered."""
        return self._score(stack.take(self._name, self._ranks)).files["eval"]

    def end(self, end: Stop, step: int, shown_as: str = "") -> bool:
        """Writes what is left, and the record; closes the folder.

        Args:
            end: why it ended. step: the last one made.
            shown_as: what the board is told in place of the status.
        Returns:
            Whether all could be written.
        """
        recorder = self._ready.recorder
        self._checkpoints.wait()
        recorder.record(end.status, end.reason, step)
        lost: list[Any] = recorder.unwritten()
        if end.status == "preempted" and step and step not in self._checkpoints.steps():
            lost.append(f"the checkpoint of step {step}")
        if lost:
            self._board.say(f"not written: {', '.join(map(str, lost))}", self._name)
        self._board.state(self._name, shown_as or end.status, end.reason)
        self._files.close()
        return not lost

    def fail(self, error: BaseException) -> None:
        """Notes in the record that the sweep broke off, where the trial had not ended."""
        if self.run.record.get("status") == "running":
            self._ready.recorder.record("failed", f"{type(error).__name__}: {error}".splitlines()[0])
            self._board.state(self._name, "failed", str(error))

    def __enter__(self) -> "OpenTrial":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def _evaluated(self, step: int, values: Mapping[str, Any]) -> None:
        self._ready.recorder.metrics(step, values)
        if NLL in values:
            self._board.evaluated(self._name, step, values, self._standing.best)

    def _scorer(
        self, config: Config, model: Model, base: Any, data: Data, programs: Programs, rows: int
    ) -> Callable[[TrainState], Found]:
        """Scores the trial's states, each once: a rung and the calendar may ask for the same."""
        sized = works.changed(config, "eval", batch_size=rows)
        score = wiring.scorer(sized, model, data, programs, base, self._shown)
        known: list[tuple[tuple[int, int], Found]] = []

        def once(state: TrainState) -> Found:
            at = (int(state.step), len(self._standing.rollbacks))
            if not known or known[-1][0] != at:
                known[:] = [(at, score(state))]
            metrics, files, *_ = known[-1][1]
            return Found({**metrics}, files)

        return once


def _filled(fitted: stacking.Fitted) -> Programs:
    """The programs of one trial of a stack, for its states as they are alone."""
    ranks = stack.ranks_of(fitted.form.like)
    placements = jax.tree.map(lambda x: x.sharding, fitted.form.like)
    fill = jax.jit(lambda state: stack.with_ranks(state, ranks), out_shardings=placements)
    effective = fitted.programs.effective
    return dataclasses.replace(fitted.programs, effective=lambda state, base: effective(fill(state), base))
