"""A base and data for sweeps small enough for a test, and a board that remembers what it was told."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxlora.config.build import sweeping
from jaxlora.config.load import load_config
from jaxlora.config.schema import Config
from jaxlora.runs.progress import Progress
from jaxlora.sweeps.trials import Halving, Trial
from tests.train.conftest import SETTINGS, conversations, write_config, write_model, write_rows


@pytest.fixture(scope="session")
def config_file(tmp_path_factory) -> Path:
    """The config that trials change, with its base and its data."""
    folder = tmp_path_factory.mktemp("sweeps")
    named = {
        "model.path": str(write_model(folder / "model")),
        "data.train": str(write_rows(folder / "train.jsonl", conversations(0, 60))),
        "data.eval": str(write_rows(folder / "eval.jsonl", conversations(60, 20))),
    }
    return write_config(folder / "tiny.py", **named, **SETTINGS)


@pytest.fixture(scope="session")
def base_config(config_file) -> Config:
    return load_config(str(config_file), [])


def trial(base: Config, name: str, **changes: Any) -> Trial:
    """A trial that changes these keys; they are written with two underscores for the dot."""
    config, told = base, {}
    for key, value in changes.items():
        section, _, field = key.rpartition("__")
        told[key.replace("__", ".")] = value
        if section:
            changed = dataclasses.replace(getattr(config, section), **{field: value})
            config = dataclasses.replace(config, **{section: changed})
        else:
            config = dataclasses.replace(config, **{field: value})
    return Trial(name, told, config)


class Told:
    """A board that keeps all that it is told."""

    def __init__(self) -> None:
        self.states: dict[str, list[str]] = {}
        self.steps: dict[str, list[int]] = {}
        self.evaluations: list[tuple[str, int, float]] = []
        self.said: list[str] = []

    def state(self, name: str, state: str, detail: str = "") -> None:
        known = self.states.setdefault(name, [])
        if known[-1:] != [state]:
            known.append(state)

    def step(self, name: str, step: int, total: int) -> None:
        self.steps.setdefault(name, []).append(step)

    def train(self, name: str, **values: Any) -> None:
        pass

    def evaluated(self, name: str, step: int, values: Any, best: Any) -> None:
        self.evaluations.append((name, step, values["eval/nll"]))

    def say(self, line: str, name: str = "") -> None:
        self.said.append(f"{name}: {line}")


class Swept:
    """A sweep that was run: its board, its outcomes, and what was shown."""

    def __init__(
        self, trials, folder: Path, at_once: int = 0, halving: Halving | None = None, leave=None, bases=None
    ):
        self.board, self.folder = Told(), folder
        with Progress(interactive=False) as progress:
            self.outcomes = sweeping.run(
                trials,
                folder,
                at_once=at_once,
                halving=halving,
                progress=progress,
                board=self.board,
                asked_to_leave=leave or (lambda: False),
                bases=bases or sweeping.Bases(),
            )


@pytest.fixture
def sweep():
    """sweep(trials, folder, at_once, halving, ...) trains trials, on one device."""
    return Swept


@contextlib.contextmanager
def see_devices(count: int) -> Iterator[None]:
    """Only so many of the devices are seen."""
    chosen = jax.local_devices()[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: chosen)
        yield


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    with see_devices(1):
        yield


def curve(folder: Path, *names: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, of these names."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", *names) if name in line} for line in lines]
