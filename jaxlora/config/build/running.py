"""One run and its folder: gone on with where it stopped, and wired to all that happens in it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxlora.config.build import guarding, programs, several, wiring
from jaxlora.config.build.inputs import Data, Model
from jaxlora.config.build.wiring import Shown
from jaxlora.config.schema import Config, to_dict
from jaxlora.core.errors import InputError
from jaxlora.runs.checkpoints import Checkpoints
from jaxlora.runs.directory import RunDirectory
from jaxlora.runs.writers import Writers
from jaxlora.training.evaluate import Found
from jaxlora.training.events import Standing
from jaxlora.training.loop import Course
from jaxlora.training.recording import Recorder
from jaxlora.training.rollback import RollingBack
from jaxlora.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Running:
    """A run, ready to be trained.

    Attributes:
        recorder: of its folder and standing. course: what happens around its steps.
        batch: step -> its batch on the devices. rollback: how it goes back.
    """

    recorder: Recorder
    course: Course
    batch: Callable[[int], Any]
    rollback: RollingBack


def check_same_data(run: RunDirectory, data: dict[str, Any]) -> None:
    """A run goes on with the data it began with, or not at all.

    Raises:
        InputError: their fingerprints differ.
    """
    began = run.record.get("data", data)
    changed = [name for name in data if data[name] != began.get(name)]
    if changed:
        names = " and ".join(f"data.{name}" for name in changed)
        raise InputError(
            f"{run.path} began with other data: {names} changed since.\nPut the old data back, or begin a new run "
            "with another --workdir."
        )


def gone_on(
    run: RunDirectory, checkpoints: Checkpoints, state: TrainState, say: Callable[[str], None]
) -> tuple[TrainState, Standing]:
    """Takes a folder back to its newest whole checkpoint, or to the start; a new one is left as it is.

    Args:
        state: that of before the first step.
        say: takes a line for the person.
    Returns:
        The state to go on from, and what the run knew of itself there.
    """
    if not run.resumed:
        return state, Standing()
    restored = checkpoints.restore(state)
    for line in checkpoints.skipped:
        say(line)
    standing = Standing()
    if restored:
        state, standing = restored.state, Standing.from_json(restored.host)
    run.truncate(restored.step if restored else -1, standing.excluded)
    checkpoints.truncate(restored.step if restored else 0)
    say(f"going on after step {restored.step}" if restored else "starting afresh: nothing was saved yet")
    return state, standing


def wired(
    config: Config,
    model: Model,
    data: Data,
    total: int,
    run: RunDirectory,
    writers: Writers,
    checkpoints: Checkpoints,
    standing: Standing,
    facts: dict[str, Any],
    evaluator: Callable[[TrainState, bool], Found],
    first_state: Callable[[], TrainState],
    shown: Shown,
) -> Running:
    """A run's recorder, events, batches and way back; the record says from here on that it is running.

    Args:
        total: steps of the run.
        run, writers, checkpoints: its folder, open. standing: of `gone_on`.
        facts: of `wiring.facts`.
        evaluator: evaluates a state; the switch says whether prompts are answered.
        first_state: makes the state before the first step.
        shown: what the person sees of it.
    """
    spec = programs.lora_spec(config)
    recorder = Recorder(run, writers, checkpoints, standing, spec, model.files, facts, shown.say)
    writers.hparams(to_dict(config))
    recorder.record("running", None)
    recorder.examples(0, wiring.texts(data), "examples")
    events = wiring.events(config, data, total, evaluator, recorder, shown)
    return Running(
        recorder,
        Course(standing, events, total, decided=several.decided),
        guarding.batches(config, model, data, standing),
        guarding.rollback(config, recorder, first_state, shown.begin),
    )
