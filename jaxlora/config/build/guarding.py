"""The guard of a run: what it names, and how a run goes back."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxlora.config.build.inputs import Data, Model
from jaxlora.config.build.programs import put_batch
from jaxlora.config.schema import Config
from jaxlora.parallel.rows import Share
from jaxlora.training.events import Standing
from jaxlora.training.guard import Guard, Policy
from jaxlora.training.recording import Recorder
from jaxlora.training.rollback import RollingBack
from jaxlora.training.state import TrainState


def guard(config: Config, data: Data, recorder: Recorder) -> Guard:
    """The run's guard, wired to its recorder and its data."""
    chosen = config.guard
    return Guard(
        recorder.standing,
        Policy(
            chosen.on_spike,
            chosen.on_nonfinite,
            chosen.on_divergence,
            chosen.window,
            chosen.max_skipped,
            chosen.max_rollbacks,
        ),
        lambda step, nll: rows_of(data, step, nll),
        recorder.metrics,
        recorder.rows,
        recorder.say,
    )


def rows_of(data: Data, step: int, nll: np.ndarray) -> dict[str, list[Any]]:
    """The examples of a step's batch, those in the worst rows first.

    Args:
        nll: of each row of the batch, [B]; one that is not finite is worse than any.
    Returns:
        Columns: "source" and "row" (from 1) say where an example stands; "example" is its number in the encoded data
        set; "batch_row" the row that it was packed into, and "nll" that row's mean per trained token; "conversation"
        its messages, or its text where it has none.
    """
    train, found = data.train, []
    for b, members in enumerate(train.rows_in(step)):
        for e in members:
            place = int(train.examples.source_rows[e])
            name, row = data.train_source.place(place)
            found.append((name, row, e, b, float(nll[b]), data.train_source[place]))
    found.sort(key=lambda one: -one[4] if np.isfinite(one[4]) else -np.inf)
    names = ("source", "row", "example", "batch_row", "nll", "conversation")
    return dict(zip(names, map(list, zip(*found, strict=True)), strict=True))


def batches(config: Config, model: Model, data: Data, standing: Standing) -> Callable[[int], Any]:
    """step -> its batch on the devices, without a trained token where the standing excludes it.

    A process of several makes and places its own rows.
    """
    put, host = put_batch(model, _micro_batches(config)), host_batches(config, model, data, standing)
    return lambda step: put(host(step))


def host_batches(
    config: Config, model: Model, data: Data, standing: Standing
) -> Callable[[int], dict[str, np.ndarray]]:
    """Likewise on the host: arrays [rows, T] of this process."""
    rows = Share(model.mesh).of_step(_micro_batches(config), config.train.micro_batch_size)

    def batch(step: int) -> dict[str, np.ndarray]:
        host = data.train.batch(step, rows)
        return host | {"weights": np.zeros_like(host["weights"])} if step in standing.excluded else host

    return batch


def _micro_batches(config: Config) -> int:
    return config.train.batch_size // config.train.micro_batch_size


def rollback(
    config: Config, recorder: Recorder, first_state: Callable[[], TrainState], begin: Callable[[int], None]
) -> RollingBack:
    """How the run goes back; see `RollingBack`."""
    return RollingBack(
        recorder,
        config.checkpoint.every,
        config.optim.learning_rate,
        config.guard.rollback_factor,
        first_state,
        begin,
    )
