"""What the pains' tests stand on: fixtures of the other rooms, and examples drawn at random."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxlora import train
from jaxlora.data.batches import Examples
from jaxlora.runs import writers
from jaxlora.training.step import make_train_step
from tests.data.conftest import _byte_level, _talk, _trained_texts, chatml, mistral_like, write
from tests.train.conftest import Project, conversations, project, talk, write_rows
from tests.training.conftest import make_tiny

__all__ = [
    "_byte_level", "_talk", "_trained_texts", "chatml", "make_tiny", "mistral_like",
    "project", "write",
]  # fmt: skip


@pytest.fixture(scope="session")
def drawn() -> Callable[[int, int], Examples]:
    """drawn(count, max_length) -> examples of random ids below 72, each with another share of trained tokens."""

    def make(count: int, max_length: int) -> Examples:
        draw = np.random.default_rng(0)
        lengths = draw.integers(4, max_length - 2, count)
        trained = [draw.random(n) < share for n, share in zip(lengths, draw.random(count), strict=True)]
        for mask in trained:
            mask[-1] = True
        return Examples(
            ids=draw.integers(0, 72, lengths.sum()).astype(np.int32),
            trained=np.concatenate(trained),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            source_rows=np.arange(count, dtype=np.int64),
            conversations=count,
            truncated=0,
            dropped=0,
            max_length=max_length,
            name="drawn",
        )

    return make


@pytest.fixture(scope="session")
def fine_tune(project: Project) -> Callable[..., str]:
    """fine_tune(workdir, **changed) runs the whole command on one device, and returns what it prints.

    Without TensorBoard, whose import takes longer than the run.
    """
    one = jax.devices()[:1]

    def run(workdir: Any, **changed: Any) -> str:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setattr(jax, "devices", lambda *_: one)
            patch.setattr(writers, "_open", lambda *_: writers._Nowhere())
            assert train.main(project.arguments(workdir, **changed)) == 0
        return out.getvalue()

    return run


@pytest.fixture(scope="session")
def lines() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of a run's metrics.jsonl."""
    return lambda workdir: [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Finished(NamedTuple):
    """A run that went through: its folder, and what it printed."""

    workdir: Path
    said: str


@pytest.fixture(scope="session")
def one_step() -> dict[str, Any]:
    """Settings of the shortest run."""
    return {"train__max_steps": 1, "optim__warmup_steps": 0, "optim__weight_decay": 0.5}


@pytest.fixture(scope="session")
def finished(fine_tune, one_step, project, tmp_path_factory) -> Finished:
    """A run of one step on 60 conversations, one that is cut at data.max_length, and two that are dropped there."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [*conversations(0, 60), talk("a", "b" * 60), talk("a" * 60, "b"), talk("a" * 70, "b")]
    data = write_rows(folder / "train.jsonl", rows)
    return Finished(folder / "run", fine_tune(folder / "run", data__train=data, **one_step))


@pytest.fixture(scope="session")
def train_step(make_tiny) -> Callable[..., Any]:
    """The tiny decoder's compiled step, one for all tests."""
    return jax.jit(make_train_step(make_tiny().decoder))
