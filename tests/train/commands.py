"""Train commands in processes of their own, and what their folders have in common."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NURSERY = Path(__file__).with_name("nursery.py")


class Command:
    """A train command in a process of its own, or the next one when that has ended."""

    def __init__(self, nursery: "subprocess.Popen[str]", output: Path):
        self._nursery, self._output = nursery, output
        self.pid = 0

    def start(self, arguments: list[str], **plan: Any) -> None:
        order = {"arguments": arguments, "output": str(self._output), **plan}
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(json.dumps(order) + "\n")
        self._nursery.stdin.flush()
        self.pid = self._answer()

    def wait(self) -> int:
        """Its exit code; minus the signal for one that was killed."""
        code, self.pid = self._answer(), 0
        return code

    def kill(self) -> None:
        """Ends one that a failed test has left, stopped perhaps."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    @property
    def output(self) -> str:
        return self._output.read_text()

    def run(self, arguments: list[str], **plan: Any) -> int:
        self.start(arguments, **plan)
        return self.wait()

    def _answer(self) -> int:
        assert self._nursery.stdout is not None
        line = self._nursery.stdout.readline()
        assert line, f"the nursery has died: {self._nursery.wait(10)}"
        return int(line)


@contextlib.contextmanager
def nursery() -> Iterator["subprocess.Popen[str]"]:
    """What `Command` starts its commands from, one at a time; each sees one device."""
    root = NURSERY.parents[2]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
        "PYTHONPATH": str(root),
    }
    with subprocess.Popen(
        [sys.executable, str(NURSERY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=root,
    ) as process:
        yield process
        process.kill()


def contents(workdir: Path) -> dict[str, bytes]:
    """What a run leaves, but for the time that it took: curves, per-example losses, adapters, config, record."""
    files = [
        *workdir.glob("eval/*"),
        *workdir.glob("best/*"),
        *workdir.glob("last/*"),
        workdir / "config.json",
    ]
    found = {str(file.relative_to(workdir)): file.read_bytes() for file in files}
    curves = (workdir / "metrics.jsonl").read_bytes()
    found["metrics.jsonl"] = re.sub(rb', "train/tokens_per_second": [\d.]+', b"", curves)
    record = json.loads((workdir / "record.json").read_text())
    found["record.json"] = json.dumps({**record, "seconds": None}).encode()
    return found


def assert_same(workdir: Path, undisturbed: Path, same_saves: bool = True) -> None:
    """Asserts that two runs left the same.

    One that was asked to leave has saved where the other did not, and one whose disk was full has not saved where the
    other did: of their checkpoints only the newest must be of one step (`same_saves=False`).
    """
    found, expected = contents(workdir), contents(undisturbed)
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name] == expected[name], name
    steps, others = (
        sorted((entry.name for entry in (run / "checkpoints").iterdir()), key=int)
        for run in (workdir, undisturbed)
    )
    assert steps[-1] == others[-1]
    if same_saves:
        assert steps == others


def last_step(workdir: Path) -> int:
    """The step of the last whole line of metrics.jsonl; -1 without one."""
    file = workdir / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def wait_for_step(command: Command, workdir: Path, step: int) -> None:
    """Returns when metrics.jsonl has a line of this step or a later one."""
    patience = time.monotonic() + 120
    while last_step(workdir) < step:
        assert time.monotonic() < patience, command.output
        time.sleep(0.002)


def wait_until_stopped(command: Command) -> None:
    """Returns when the command has stopped itself, as it was planned to."""
    patience = time.monotonic() + 300
    while Path(f"/proc/{command.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < patience, command.output
        time.sleep(0.02)
