"""A disk that is full, or a folder that cannot be written, for some steps of a run: it is told, and nothing is lost."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train import commands
from tests.train.commands import Command, assert_same, last_step, wait_until_stopped
from tests.train.conftest import Project
from tests.train.test_faults import SETTINGS

BATCH = (
    "jaxlora.data.batches:Batches.batch"  # its n-th call is made during step n - 1, before that is looked at
)


def start_and_stop(command: Command, arguments: list[str], steps: list[int]) -> None:
    """Starts a command that stops before each of these steps, and waits for the first."""
    command.start(arguments, stop=[[BATCH, step] for step in steps])
    wait_until_stopped(command)


def go_on(command: Command, until_stopped: bool = False) -> None:
    os.kill(command.pid, signal.SIGCONT)
    if until_stopped:
        time.sleep(0.2)
        wait_until_stopped(command)


@pytest.fixture(scope="module")
def nursery():
    with commands.nursery() as process:
        yield process


@pytest.fixture
def command(nursery, tmp_path) -> Iterator[Command]:
    command = Command(nursery, tmp_path / "output.txt")
    yield command
    command.kill()


@pytest.fixture(scope="module")
def undisturbed(nursery, project, tmp_path_factory) -> Path:
    """Its best step is one of those that find the disk full."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = Command(nursery, folder / "output.txt")
    assert command.run(project.arguments(folder / "run", **SETTINGS)) == 0, command.output
    return folder / "run"


class Disk:
    """A file system of eight megabytes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._others = folder / "somebody else's files"

    def fill(self) -> None:
        """Fills it for good: what is deleted from now on makes no room, for every file has a second name."""
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        self._others.mkdir()
        for number, file in enumerate(files):
            os.link(file, self._others / f"{number}")
        with (self._others / "filler").open("ab", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(4096))
            except OSError:
                return

    def free(self) -> None:
        shutil.rmtree(self._others)


@pytest.fixture
def disk(tmp_path, command) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield Disk(folder)
    command.kill()
    subprocess.run(["umount", folder], check=True)


def steps_saved(workdir: Path) -> list[int]:
    return sorted(int(entry.name) for entry in (workdir / "checkpoints").iterdir() if entry.name.isdigit())


def contents(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def best_of(undisturbed: Path) -> int:
    return json.loads((undisturbed / "record.json").read_text())["best"]["step"]


@pytest.mark.slow
def test_a_disk_that_is_full_for_some_steps(command, undisturbed, project: Project, disk):
    """Everything that could not be written is told, and written as soon as there is room."""
    workdir, best = disk.folder / "run", best_of(undisturbed)
    start_and_stop(command, project.arguments(workdir, **SETTINGS), [best - 1, best + 4])
    files = {name: workdir / name / "adapter_model.safetensors" for name in ("best", "last")}
    files |= {name: workdir / name for name in (f"eval/eval-{best:08d}.jsonl", "record.json")}
    before, old = steps_saved(workdir), {name: contents(file) for name, file in files.items()}
    adapter = old["best"]
    disk.fill()
    go_on(command, until_stopped=True)
    told = command.output
    assert f"the checkpoint of step {best} could not be saved" in told
    assert "No space left on device" in told
    for name, file in files.items():
        assert f"{workdir / name} could not be written" in told, name
        assert contents(file) == old[name], name
    # A full disk still takes what fits into a file's last page, so the curves' first lines may get there.
    assert f"{workdir / 'metrics.jsonl'} could not be written" in told or last_step(workdir) >= best
    assert before[-1] <= steps_saved(workdir)[-1] < best - 1  # one may just have been on its way
    # A broken adapter never is in the place.
    later = (undisturbed / "best/adapter_model.safetensors").read_bytes()
    assert (workdir / "best/adapter_model.safetensors").read_bytes() in (adapter, later)

    disk.free()
    go_on(command)
    assert command.wait() == 0, command.output
    assert "Traceback" not in command.output
    assert_same(workdir, undisturbed, same_saves=False)


@pytest.mark.slow
def test_killed_while_the_disk_is_full_and_full_to_the_end(command, undisturbed, project: Project, disk):
    """It goes on from the last whole checkpoint; it ends with 1 when there is no room, and with 0 when there is."""
    workdir, best = disk.folder / "run", best_of(undisturbed)
    arguments = project.arguments(workdir, **SETTINGS)
    start_and_stop(command, arguments, [best - 1, best + 4])
    disk.fill()
    go_on(command, until_stopped=True)
    os.kill(command.pid, signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    saved = steps_saved(workdir)
    assert 0 < saved[-1] < best - 1

    disk.free()
    start_and_stop(command, arguments, [3])
    disk.fill()
    go_on(command)
    assert command.wait() == 1, command.output
    assert f"going on after step {saved[-1]}\n" in command.output
    (line,) = (line for line in command.output.splitlines() if line.startswith("not written: "))
    for file in ("best", "last", "record.json", "metrics.jsonl"):
        assert str(workdir / file) in line
    assert "Traceback" not in command.output

    disk.free()
    assert command.run(arguments) == 0, command.output
    assert "going on after step" in command.output
    assert_same(workdir, undisturbed)


@pytest.mark.slow
def test_folders_that_cannot_be_written_for_some_steps(command, undisturbed, project: Project, tmp_path):
    """For root no folder is read-only; where a file lies in its place, nobody can write into it."""
    workdir, best = tmp_path / "run", best_of(undisturbed)
    start_and_stop(command, project.arguments(workdir, **SETTINGS), [best - 1, best + 4])
    names = ("checkpoints", "eval", "best", "last")
    for name in names:
        (workdir / name).rename(workdir / f"{name} is here")
        (workdir / name).touch()
    go_on(command, until_stopped=True)
    assert f"the checkpoint of step {best} could not be saved to {workdir / 'checkpoints'}" in command.output
    for file in ("best", "last", f"eval/eval-{best:08d}.jsonl"):
        assert f"{workdir / file} could not be written" in command.output, file
    for name in names:
        (workdir / name).unlink()
        (workdir / f"{name} is here").rename(workdir / name)
    assert 0 < steps_saved(workdir)[-1] < best - 1
    go_on(command)
    assert command.wait() == 0, command.output
    assert "Traceback" not in command.output
    assert_same(workdir, undisturbed, same_saves=False)
