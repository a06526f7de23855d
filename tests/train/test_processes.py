"""Several real processes train as one does: the same curves and adapters, one writer, and all of them end together."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora.runs.files import lock_folder, release
from tests.train import commands
from tests.train.commands import last_step

pytestmark = pytest.mark.slow

SETTINGS = {
    "train__max_steps": 8,
    "train__micro_batch_size": 4,
    "eval__every": 2,
    "eval__batch_size": 4,
    "eval__generate": 5,
    "eval__max_new_tokens": 4,
    "checkpoint__every": 2,
    # More than any evaluation brings: the run stops at step 6, which takes the files that process 0 alone has.
    "stop__patience": 3,
    "stop__min_delta": 30.0,
    "stop__min_delta_unit": "standard_errors",
}
LOST_AFTER = 12
WRITTEN = "metrics.jsonl record.json config.json eval spikes best last tensorboard .lock".split()
"""What process 0 alone may touch."""


class Crew:
    """The processes of one train command, or those of the next when they have ended."""

    def __init__(self, nursery: "subprocess.Popen[str]", folder: Path):
        self._nursery, self._folder = nursery, folder
        self.pids: list[int] = []

    def start(
        self,
        count: int,
        arguments: list[str],
        devices: int = 1,
        plans: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        """Starts `count` processes with so many simulated devices each, with the plan of each for the nursery."""
        with socket.socket() as taken:
            taken.bind(("localhost", 0))
            port = taken.getsockname()[1]
        environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        orders = []
        for index in range(count):
            plan = dict((plans or {}).get(index, {}))
            joined = [
                "--coordinator",
                f"localhost:{port}",
                "--processes",
                str(count),
                "--process",
                str(index),
            ]
            given = [*arguments, *plan.pop("changed", ()), *joined, "--lost-after", str(LOST_AFTER)]
            files = {name: str(self._folder / f"{name}{index}") for name in ("output", "errors")}
            orders.append({"arguments": given, "environment": environment, **files, **plan})
        self._say(orders)
        self.pids = [self._answer() for _ in orders]

    def wait(self) -> list[int]:
        """The exit codes; minus the signal for one that was killed."""
        codes = [self._answer() for _ in self.pids]
        self.pids = []
        return codes

    def run(self, *arguments: Any, **named: Any) -> list[int]:
        self.start(*arguments, **named)
        return self.wait()

    def output(self, index: int) -> str:
        return (self._folder / f"output{index}").read_text()

    def errors(self, index: int) -> str:
        return (self._folder / f"errors{index}").read_text()

    def kill(self) -> None:
        """Ends those that a failed test has left."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def _say(self, orders: list[dict[str, Any]]) -> None:
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(json.dumps(orders) + "\n")
        self._nursery.stdin.flush()

    def _answer(self) -> int:
        assert self._nursery.stdout is not None
        return int(self._nursery.stdout.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator["subprocess.Popen[str]"]:
    with commands.nursery() as process:
        yield process


@pytest.fixture
def crew(nursery, tmp_path) -> Iterator[Crew]:
    found = Crew(nursery, tmp_path)
    yield found
    found.kill()


@pytest.fixture(scope="module")
def alone(nursery, project, tmp_path_factory) -> Path:
    """The run of one process on one device."""
    folder = tmp_path_factory.mktemp("alone")
    command = commands.Command(nursery, folder / "output")
    assert command.run(project.arguments(folder / "run", **SETTINGS)) == 0, command.output
    return folder / "run"


@pytest.fixture
def arguments(project, tmp_path) -> Callable[..., list[str]]:
    return lambda **changed: project.arguments(tmp_path / "run", **{**SETTINGS, **changed})


def lines(workdir: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name != "train/tokens_per_second"} for line in found]


def assert_close(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close = pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value
        assert found[name] == close, (name, expected)


def assert_equal(workdir: Path, expected: Path, status: str = "stopped_early") -> None:
    """Asserts that two runs came to the same, to the rounding of float32."""
    ours, theirs = lines(workdir), lines(expected)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)
    for name in ("best", "last"):
        found, wanted = (load_file(run / name / "adapter_model.safetensors") for run in (workdir, expected))
        assert found.keys() == wanted.keys()
        for key in found:
            assert np.linalg.norm(found[key] - wanted[key]) <= 1e-4 * np.linalg.norm(wanted[key]), key
    files = sorted(file.name for file in (expected / "eval").iterdir())
    assert sorted(file.name for file in (workdir / "eval").iterdir()) == files
    for name in files:
        pair = ((run / "eval" / name).read_text().splitlines() for run in (workdir, expected))
        for one, other in zip(*(map(json.loads, part) for part in pair), strict=True):
            assert_close(one, other)
    records = [json.loads((run / "record.json").read_text()) for run in (workdir, expected)]
    assert records[1]["status"] == status
    for key in ("status", "steps", "tokens", "evaluations", "data"):
        assert records[0][key] == records[1][key]
    assert records[0]["best"]["step"] == records[1]["best"]["step"]
    steps = [
        sorted(int(entry.name) for entry in (run / "checkpoints").iterdir()) for run in (workdir, expected)
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [(2, 2, {"data": 2, "fsdp": 2}), (4, 1, {"data": 1, "fsdp": 2, "tensor": 2})],
    ids=["2-data2-fsdp2", "4-fsdp2-tensor2"],
)
def test_processes_are_as_one(crew, alone, arguments, tmp_path, count, devices, mesh):
    """With tensor across processes, two of them have the same rows; each is counted once. Nobody else writes."""
    never = {"never": [str(tmp_path / "run" / name) for name in WRITTEN]}
    plans = dict.fromkeys(range(1, count), never)
    given = arguments(**{f"mesh__{axis}": size for axis, size in mesh.items()})
    assert crew.run(count, given, devices=devices, plans=plans) == [0] * count, crew.errors(0)
    assert_equal(tmp_path / "run", alone)
    assert f"devices        {count * devices} x" in crew.output(0)
    for index in range(1, count):
        assert crew.output(index) == ""
        assert crew.errors(index) == ""


@pytest.mark.parametrize(("dead", "then"), [(0, 1), (1, 4)])
def test_when_one_dies_the_others_stop_and_another_number_goes_on(
    crew, alone, arguments, tmp_path, dead, then
):
    plans = {dead: {"die": ["jaxlora.training.events:Log.__call__", 5]}}
    crew.start(2, arguments(), devices=2, plans=plans)
    while last_step(tmp_path / "run") < 4:
        time.sleep(0.1)
    began = time.monotonic()
    codes = crew.wait()
    assert time.monotonic() - began < LOST_AFTER + 20
    assert codes[dead] == -signal.SIGKILL
    assert codes[1 - dead] == 1, crew.errors(1 - dead)
    told = crew.errors(1 - dead)
    assert (
        f"process {dead} of 2 has died, or cannot be reached (--lost-after {LOST_AFTER} s). All others"
        in told
    )
    goes_on = re.search(r"The same command goes on from step (\d), on as many processes as there are\.", told)
    assert goes_on, told
    assert goes_on[1] in ("2", "4")  # that of 4 was on its way, in the background
    assert "Traceback" not in told
    if dead == 1:
        assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "failed"

    assert crew.run(then, arguments()) == [0] * then, crew.errors(0)
    assert f"going on after step {goes_on[1]}" in crew.output(0)
    assert_equal(tmp_path / "run", alone)


def test_a_request_to_leave_reaches_all(crew, arguments, tmp_path):
    """SIGTERM to one of them, and all leave after the same step, which is saved; the same command goes on."""
    long = {"train__max_steps": 300, "eval__every": 100, "checkpoint__every": 50, "eval__generate": 0}
    given = arguments(**long)
    crew.start(2, given)
    while last_step(tmp_path / "run") < 5:
        time.sleep(0.05)
    os.kill(crew.pids[1], signal.SIGTERM)
    assert crew.wait() == [0, 0], crew.errors(0)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "preempted", crew.output(0)
    assert (tmp_path / "run" / "checkpoints" / str(record["steps"])).is_dir()
    assert crew.run(2, given) == [0, 0], crew.errors(0)
    assert f"going on after step {record['steps']}" in crew.output(0)


def test_a_rollback_is_everyones(crew, project, tmp_path):
    """Going back takes checkpoints, best/ and standing of all processes; the curve is that of one process."""
    rolling = {**SETTINGS, "guard__on_spike": "rollback", "guard__threshold": 1e-3, "guard__max_rollbacks": 2}
    rolling |= {"stop__patience": 100, "eval__generate": 0}
    for count, name in ((1, "one"), (2, "two")):
        assert crew.run(count, project.arguments(tmp_path / name, **rolling)) == [0] * count, crew.errors(0)
    one, two = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("one", "two"))
    assert one["rollbacks"] == two["rollbacks"]
    assert [told["to"] > 0 for told in one["rollbacks"]] == [False, True]  # to the start, and to a checkpoint
    assert_equal(tmp_path / "two", tmp_path / "one", "diverged")


def test_different_configs_are_refused_by_all(crew, arguments, tmp_path):
    plans = {1: {"changed": ["--config.optim.learning_rate=0.5"]}}
    assert crew.run(2, arguments(), plans=plans) == [2, 2]
    told = (
        "error: process 1 of 2 has another config: optim.learning_rate is 0.5 there and 0.01 in process 0.\n"
    )
    for index in (0, 1):
        assert crew.errors(index).startswith(told)
        assert len(crew.errors(index).splitlines()) == 2
    assert not (tmp_path / "run").exists()


def test_what_process_0_refuses_ends_all(crew, arguments, tmp_path):
    (tmp_path / "run").mkdir()
    lock = lock_folder(tmp_path / "run")
    try:
        assert crew.run(2, arguments()) == [2, 2]
    finally:
        release(lock)
    for index in (0, 1):
        assert crew.errors(index).startswith(f"error: {tmp_path / 'run'} is in use by process {os.getpid()}")


@pytest.mark.parametrize(
    ("error", "code"), [("builtins:ValueError", 1), ("jaxlora.core.errors:InputError", 2)]
)
def test_what_goes_wrong_in_one_ends_all(crew, arguments, error, code):
    """Process 1 cannot read its part of the base; process 0, which waits for it at the first step, hears of it."""
    plans = {1: {"fail": ["jaxlora.config.build.inputs:base", 1, error]}}
    assert crew.run(2, arguments(), plans=plans) == [code, code], crew.errors(0)
    if code == 2:
        assert crew.errors(0) == crew.errors(1) == "error: as it was planned\n"
        return
    assert crew.errors(1).startswith("Traceback")
    assert crew.errors(0).startswith(
        "process 1 of 2 has failed: ValueError: as it was planned. All others stop.\n"
    )
    assert "Traceback" not in crew.errors(0)


def test_an_evaluation_is_shared_out_too(crew, alone):
    """Two processes of two devices give what one gives; process 0 alone prints it."""
    scored = []
    for count, devices in ((1, 1), (2, 2)):
        given = ["--run", str(alone), "--step", "6", "--generate", "5", "--max-new-tokens", "4", "--json"]
        plans = {index: {"module": "jaxlora.evaluate"} for index in range(count)}
        assert crew.run(count, given, devices=devices, plans=plans) == [0] * count, crew.errors(0)
        lines = [line for line in crew.output(0).splitlines() if line.startswith("{")]
        scored.append(json.loads(lines[0]))
        assert [crew.output(index) for index in range(1, count)] == [""] * (count - 1)
    one, two = (
        {key: v for key, v in found.items() if not key.startswith(("seconds", "tokens_"))} for found in scored
    )
    assert_close(two, one)
