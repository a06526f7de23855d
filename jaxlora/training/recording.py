"""What a run leaves in its folder, by the hands that know how: curves, adapters, checkpoints, the record."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxlora.lora.peft import save_peft
from jaxlora.lora.spec import LoraSpec
from jaxlora.lora.variants import ordinary
from jaxlora.models.weights import ModelFiles
from jaxlora.runs.checkpoints import Checkpoints
from jaxlora.runs.directory import RunDirectory
from jaxlora.runs.writers import Writers
from jaxlora.training.events import Standing
from jaxlora.training.state import TrainState


@dataclasses.dataclass
class Recorder:
    """The one place through which a run's outcome reaches its folder.

    Attributes:
        run, writers, checkpoints: of the run's folder.
        standing: what the run knows of itself.
        spec, base: the adapter's constants and the model it belongs to; written into the adapters.
        facts: fields of record.json that don't change while the run goes on.
        say: takes a line for the person; problems with the disk are told here, as they come.
    """

    run: RunDirectory
    writers: Writers
    checkpoints: Checkpoints
    standing: Standing
    spec: LoraSpec
    base: ModelFiles
    facts: Mapping[str, Any]
    say: Callable[[str], None]
    began: float = dataclasses.field(default_factory=time.monotonic)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, and TensorBoard's."""
        self.writers.scalars(step, values)

    def examples(self, step: int, columns: Mapping[str, list[Any]], name: str) -> None:
        """A file of eval/."""
        self.run.write_evaluation(step, columns, name)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts for TensorBoard, in Markdown."""
        self.writers.texts(step, texts)

    def best(self, state: TrainState) -> None:
        """The state's adapter becomes best/."""
        self._adapter(self.run.best, state)

    def last(self, state: TrainState) -> None:
        """The state's adapter becomes last/."""
        self._adapter(self.run.last, state)

    def save(self, step: int, state: TrainState, best: bool) -> None:
        """A checkpoint, adapter last/, and the record. The time so far goes into the standing first."""
        now = time.monotonic()
        self.standing.seconds += now - self.began
        self.began = now
        if step > 0:
            self.checkpoints.save(step, state, self.standing.to_json(), best)
        self.last(state)
        self.record("running", None, step)

    def record(self, status: str, reason: str | None, step: int | None = None) -> None:
        """Brings record.json up to date.

        Args:
            status: running, finished, stopped_early, diverged, preempted or failed.
            reason: one line, or None while running.
            step: optimiser steps done; None leaves what the record says.
        """
        standing = self.standing
        steps = {} if step is None else {"steps": step}
        self.run.update_record(
            status=status,
            reason=reason,
            **steps,
            best=standing.best,
            first=standing.first,
            last=standing.last,
            tokens=standing.tokens,
            seconds=round(standing.seconds, 1),
            skipped_updates=standing.skipped,
            **self.facts,
        )
        self.tell_problems()

    def tell_problems(self) -> None:
        """Says what could not be written since the last time."""
        for line in (*self.checkpoints.problems(), *self.run.problems(), *self.writers.problems()):
            self.say(line)

    def _adapter(self, folder: Any, state: TrainState) -> None:
        try:
            save_peft(
                folder, *ordinary(state.adapter, self.spec, state.anchor), self.base.name, self.base.revision
            )
        except OSError as error:  # a full disk must not end the run; the next save tries again
            self.say(
                f"{folder} could not be written ({error.strerror or error}); what was there before stays"
            )
