"""Whole runs that meet a poisoned batch or far too high a rate: found at its step, its rows named, dealt with as told."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.train.conftest import conversations, talk, write_rows

ABSURD = "~^`|{}<>=+"
POISONED = 10
"""The step whose batch is absurd: batches of 8 rows, one example each, in the order of the file."""

SETTINGS = {
    "data__packing": False, "data__shuffle": False, "train__max_steps": 14, "eval__every": 4, "checkpoint__every": 4,
    "optim__learning_rate": 3e-2, "guard__window": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> Path:
    """120 rows, of which those of step 10 (rows 73 to 80 of the file) ask for what no other row has."""
    rows = conversations(0, 120)
    for i in range(8 * (POISONED - 1), 8 * POISONED):
        rows[i] = talk("a", "".join(ABSURD[(i + j) % len(ABSURD)] for j in range(20 + i % 8)))
    return write_rows(tmp_path_factory.mktemp("poisoned") / "train.jsonl", rows)


def lines(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def record(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "record.json").read_text())


def rows_of_spike(workdir: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / f"spikes/spike-{step:08d}.jsonl").read_text().splitlines()]


def test_x(call, project, poisoned, tmp_path):
    for policy in ("log", "skip", "rollback", "stop"):
        ended = call(project.arguments(tmp_path / policy, data__train=poisoned, guard__on_spike=policy, guard__on_nonfinite="stop", **SETTINGS))
        print(ended.out, ended.err)
        print((tmp_path / policy / "metrics.jsonl").read_text(), record(tmp_path / policy))
        for f in (tmp_path / policy / "spikes").glob("*"): print(f, f.read_text()[:600])
    assert 0
