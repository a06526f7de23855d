"""What a run leaves in its folder, by the hands that know how: curves, adapters, checkpoints, the record."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlora.lora.peft import save_peft
from jaxlora.lora.spec import LoraSpec
from jaxlora.lora.variants import ordinary
from jaxlora.models.weights import ModelFiles
from jaxlora.parallel import exchange
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
    _unwritten: dict[Path, tuple[dict[str, Any], LoraSpec]] = dataclasses.field(default_factory=dict)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, and TensorBoard's."""
        self.writers.scalars(step, values)

    def examples(self, step: int, columns: Mapping[str, list[Any]], name: str) -> None:
        """A file of eval/."""
        self.run.write_evaluation(step, columns, name)

    def recall(self, step: int, name: str) -> dict[str, list[Any]] | None:
        """The columns of an earlier evaluation's file, None when it is gone, or another process's."""
        if not self.run.writes:
            return None
        try:
            return self.run.read_evaluation(step, name)
        except (OSError, ValueError):
            return None

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts (Markdown) for TensorBoard."""
        self.writers.texts(step, texts)

    def rows(self, step: int, columns: Mapping[str, Sequence[Any]]) -> str:
        """A file of spikes/; its name."""
        return f"{self.run.spikes.name}/{self.run.write_spike(step, columns).name}"

    def best(self, state: TrainState) -> None:
        """The state's adapter becomes best/."""
        self._adapter(self.run.best, state)

    def last(self, state: TrainState) -> None:
        """The state's adapter becomes last/."""
        self._adapter(self.run.last, state)

    def save(self, step: int, state: TrainState) -> None:
        """A checkpoint, adapter last/, and the record. The time so far goes into the standing first.

        The checkpoints of the best few evaluations stay besides the newest, and the one to roll back to.
        """
        now = time.monotonic()
        self.standing.seconds += now - self.began
        self.began = now
        if step > 0:
            kept = {int(best["step"]) for best in self.standing.bests} | {*self.standing.held}
            self.checkpoints.save(step, state, self.standing.to_json(), kept)
        self.last(state)  # and best/, if that waits
        self.record("running", None, step)

    def record(self, status: str, reason: str | None, step: int | None = None) -> None:
        """Brings record.json up to date.

        Args:
            status: running, finished, stopped_early, diverged, preempted or failed.
            reason: one line, or None while running.
            step: optimiser steps done; None leaves what the record says.
        """
        if status != "running":
            self._write_adapters()
        standing = self.standing
        steps = {} if step is None else {"steps": step}
        self.run.update_record(
            status=status,
            reason=reason,
            **steps,
            best=standing.best,
            bests=standing.bests,
            first=standing.first,
            last=standing.last,
            evaluations=standing.evaluations,
            overfit=standing.overfit,
            tokens=standing.tokens,
            seconds=round(standing.seconds, 1),
            skipped_updates=standing.skipped,
            spikes=standing.spikes,
            rollbacks=standing.rollbacks,
            **self.facts,
        )
        self.tell_problems()

    def unwritten(self) -> list[Path]:
        """The adapters and files that could not be written until now."""
        return [*self._unwritten, *self.run.unwritten()]

    def tell_problems(self) -> None:
        """Says what could not be written since the last time."""
        for line in (*self.checkpoints.problems(), *self.run.problems(), *self.writers.problems()):
            self.say(line)

    def _adapter(self, folder: Path, state: TrainState) -> None:
        adapter, anchor = exchange.whole(state.adapter), exchange.whole(state.anchor)  # by all processes
        if self.run.writes:
            self._unwritten[folder] = ordinary(adapter, self.spec, anchor)
            self._write_adapters()

    def _write_adapters(self) -> None:
        """Writes the adapters that wait: a new one, and what could not be written when it was new."""
        for folder, adapter in list(self._unwritten.items()):
            try:
                save_peft(folder, *adapter, self.base.name, self.base.revision)
            except OSError as error:  # a full disk must not end the run
                # The state's own memory, on a CPU, and that is donated.
                pairs = jax.tree.map(lambda leaf: np.array(leaf, copy=True), adapter[0])
                self._unwritten[folder] = (pairs, adapter[1])
                self.say(
                    f"{folder} could not be written ({error.strerror or error}); what was there before stays, and the "
                    "next save tries again"
                )
            else:
                del self._unwritten[folder]
