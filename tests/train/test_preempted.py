"""A run that has joined jax.distributed is told by it that its machine will go: through Orbax, at an agreed step."""

import json
import os
import signal
import socket

import pytest

from tests.train import commands
from tests.train.commands import Command, assert_same, last_step, wait_for_step

# A notice is a second on its way, and steps of this model take little of it.
SETTINGS = {"train__max_steps": 300, "eval__every": 100, "checkpoint__every": 20, "log__every": 1}


@pytest.fixture
def command(tmp_path):
    with commands.nursery() as process:
        yield Command(process, tmp_path / "output.txt")


@pytest.mark.slow
def test_sigterm_where_jax_distributed_runs(command, project, tmp_path):
    alone, workdir = tmp_path / "alone", tmp_path / "run"
    assert command.run(project.arguments(alone, **SETTINGS)) == 0, command.output
    arguments = project.arguments(workdir, **SETTINGS)
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}

    # Before training begins there is nothing to save: the first one ends it, as it would without jax.distributed.
    start = ["jaxlora.config.build.inputs:base", 1, [signal.SIGTERM]]
    assert command.run(arguments, die=start, environment=address) == -signal.SIGTERM, command.output

    # A request goes to JAX's notifier alone; that the run leaves is Orbax's word.
    for _ in range(2):
        first = last_step(workdir) + 4
        command.start(arguments, environment=address)
        wait_for_step(command, workdir, first)
        os.kill(command.pid, signal.SIGTERM)
        assert command.wait() == 0, command.output
        record = json.loads((workdir / "record.json").read_text())
        assert record["status"] == "preempted", command.output
        assert "SIGTERM: saving after this step and leaving" in command.output
        assert (workdir / "checkpoints" / str(record["steps"])).is_dir()
        assert record["steps"] > first

    # A second one does not wait for anybody.
    step = ["jaxlora.data.batches:Batches.batch", 3, [signal.SIGTERM, signal.SIGTERM]]
    assert command.run(arguments, die=step, environment=address) == -signal.SIGTERM, command.output
    assert f"going on after step {record['steps']}" in command.output

    # Where it cannot be started, the run goes on without.
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
        assert command.run(arguments, environment=address) == 0, command.output
    assert f"jax.distributed could not be started (port {port}: " in command.output
    assert f"going on after step {record['steps']}" in command.output
    assert_same(workdir, alone)
