"""Going back to an earlier state, and on from there with a lower learning rate and without the rows that spiked.

As if the run had been killed and resumed there: what came later leaves no trace but in the record, in the folder of
spikes, and in what is different from then on. Nothing of it has to be saved at once. A run that is killed before its
next checkpoint goes on from the same state, meets the same spike at the same step, and goes back the same way.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxlora.parallel.rows import placed
from jaxlora.training.events import Rollback, Standing
from jaxlora.training.recording import Recorder
from jaxlora.training.state import TrainState

CARRIED = ("skipped", "spikes", "rollbacks", "excluded", "seconds")
"""Fields of the standing that a rollback does not take back."""


@dataclasses.dataclass
class RollingBack:
    """Carries rollbacks out.

    Attributes:
        recorder: of the run's folder and standing.
        every: steps between the checkpoints of the calendar. One that was written because the run was asked to leave
            is no place to go back to: without the request it would not be there.
        learning_rate: the run's own; factor: what each rollback multiplies it by.
        first_state: makes the state before the first step.
        begin: told the step after which training goes on.
    """

    recorder: Recorder
    every: int
    learning_rate: float
    factor: float
    first_state: Callable[[], TrainState]
    begin: Callable[[int], None]

    def __call__(self, verdict: Rollback, state: TrainState) -> TrainState:
        """Takes standing and folder back; returns the state to go on from.

        Args:
            verdict: where it was found necessary.
            state: any state of this run, for its shapes and placements.
        """
        recorder, standing = self.recorder, self.recorder.standing
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        step, state, restored = self._restored(self._target(verdict.step), like)
        rate = self.learning_rate * self.factor ** (len(standing.rollbacks) + 1)
        standing.rollbacks.append({"step": verdict.step, "to": step, "learning_rate": rate})
        standing.excluded.append(verdict.step)

        # The checkpoints first: killed between two of these lines, the run goes on from here all the same.
        recorder.checkpoints.truncate(step)
        recorder.run.truncate(step if step else -1, standing.excluded)
        recorder.writers.forget(step if step else -1)
        self._put_best_back(restored, state, like)
        for field in dataclasses.fields(Standing):
            if field.name not in CARRIED:
                setattr(standing, field.name, getattr(restored, field.name))
        for (
            told
        ) in standing.rollbacks:  # on the step after, whose line a resume from here drops and writes again
            if told["to"] >= step:
                recorder.metrics(step + 1, {"train/rollback": told["step"], "train/rollback_to": told["to"]})
        recorder.record("running", None, step)
        recorder.say(
            f"{verdict.reason}: going back to {f'step {step:,}' if step else 'the start'}, and on with a learning "
            f"rate of {rate:.3g} and without the batch of step {verdict.step:,} (rollback {len(standing.rollbacks)})"
        )
        self.begin(step)
        optimizer = state.settings.optimizer
        leaf = jax.tree.leaves(like.settings.optimizer.learning_rate)[0]
        lower = placed(np.float32(rate), leaf.sharding)
        return state._replace(
            settings=state.settings._replace(optimizer=optimizer._replace(learning_rate=lower))
        )

    def _target(self, spike: int) -> int:
        """The last good step; one of the calendar before it, when it was tried and the very next step spiked again."""
        standing = self.recorder.standing
        good, tried = standing.good, [told["to"] for told in standing.rollbacks]
        next_step = good + 1
        while next_step in standing.excluded:
            next_step += 1
        return max(0, good - self.every) if good in tried and spike == next_step else good

    def _restored(self, target: int, like: Any) -> tuple[int, TrainState, Standing]:
        """The newest intact state of the calendar that is no later than the target, or the first of all."""
        checkpoints = self.recorder.checkpoints
        for step in reversed(checkpoints.steps()):
            if step > target or step % self.every:
                continue
            found = checkpoints.restore(like, step)
            for line in checkpoints.skipped:
                self.recorder.say(line)
            if found:
                return step, found.state, Standing.from_json(found.host)
        return 0, self.first_state(), Standing()

    def _put_best_back(self, restored: Standing, state: TrainState, like: Any) -> None:
        """best/ becomes the best adapter of before, where a later one stands in it.

        At the start there is nothing to put back: the first evaluation is about to be made again.
        """
        recorder, now = self.recorder, self.recorder.standing
        if restored.best is None or now.best is None or restored.best["step"] == now.best["step"]:
            return
        step = int(restored.best["step"])
        if step == 0:
            recorder.best(self.first_state())
        elif step == int(state.step):
            recorder.best(state)
        elif found := recorder.checkpoints.restore(like, step):
            recorder.best(found.state)
        else:  # no harm: what stands there is better, and the record goes on saying so
            restored.best, restored.bests = now.best, now.bests
