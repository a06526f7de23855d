"""Killed at random moments and resumed by the same command, a run ends with the bytes of an undisturbed one."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxlora.runs.checkpoints import Checkpoints

TOY = Path(__file__).with_name("toy_run.py")
KILLS = 5


def start(folder: Path, pace: float) -> "subprocess.Popen[str]":
    command = [sys.executable, str(TOY), str(folder), str(pace)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    """All the run's own files; checkpoints are compared by what they restore, for Orbax notes the time in them."""
    files = (file for file in folder.rglob("*") if file.is_file() and "checkpoints" not in file.parts)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.name != ".lock"}


def restored_step(folder: Path) -> tuple[int, bytes]:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        restored = checkpoints.restore({"w": jnp.zeros((20, 50)), "step": jnp.zeros((), jnp.int32)})
        assert restored is not None
        return restored.step, bytes(restored.state["w"].tobytes())


def saved_since(folder: Path, step: int) -> bool:
    return any(int(entry.name) > step for entry in (folder / "checkpoints").iterdir() if entry.name.isdigit())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with start(folder, pace=0) as run:
        errors = run.communicate(timeout=60)[1]
        assert run.returncode == 0, errors
    return folder


@pytest.mark.slow
def test_a_run_killed_five_times_ends_as_an_undisturbed_one(undisturbed, tmp_path):
    killed = tmp_path / "run"
    chance = random.Random(7)
    kills, starts = 0, []
    while True:
        with start(killed, pace=0.05) as run:
            assert run.stdout is not None
            line = run.stdout.readline()
            assert line.startswith("from "), run.communicate()
            assert "damaged" not in line  # a kill is no damage: what is not complete does not count as saved
            starts.append(int(line.split()[1]))
            if kills == KILLS:
                errors = run.communicate(timeout=60)[1]
                assert run.returncode == 0, errors
                break
            last = starts[-1] + chance.randint(1, 8)
            while int(run.stdout.readline()) < last or (
                kills % 2 == 0 and not saved_since(killed, starts[-1])
            ):
                pass
            time.sleep(chance.uniform(0, 0.1))  # in a step, an evaluation, a save, or a deletion
            run.kill()
            kills += 1

    assert len(set(starts)) > 2, "hardly a start went on from a checkpoint: the test shows nothing"
    assert contents(killed) == contents(undisturbed)
    assert restored_step(killed) == restored_step(undisturbed)
    names = sorted(entry.name for entry in (undisturbed / "checkpoints").iterdir())
    assert sorted(entry.name for entry in (killed / "checkpoints").iterdir()) == names


def test_a_run_whose_newest_checkpoint_is_cut_short_says_so_and_ends_the_same(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    for file in (folder / "checkpoints" / "60" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with start(folder, pace=0) as run:
        output, errors = run.communicate(timeout=60)
        assert run.returncode == 0, errors
    assert output.startswith("from 56 checkpoint ")
    assert "checkpoints/60 is damaged" in output
    assert errors == ""  # one line tells it; no traceback of Orbax's does
    assert contents(folder) == contents(undisturbed)
