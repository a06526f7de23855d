"""A run that was killed, asked to leave, or lost its newest checkpoint ends with the bytes of an undisturbed one."""

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train import commands
from tests.train.commands import Command, assert_same, contents, last_step, wait_for_step

# Ten batches an evaluation, and a checkpoint every other step: much to be interrupted in.
SHAPE = {
    "eval__batch_size": 1,
    "checkpoint__every": 2,
    "eval__every": 3,
    "train__max_steps": 16,
    "log__every": 2,
}
PATIENCE = {
    **SHAPE,
    "train__max_steps": 60,
    "optim__learning_rate": 0.1,
    "stop__patience": 2,
    "stop__min_steps": 20,
    "eval__every": 2,
}

VARIANTS = {
    "lora__use_dora": True,
    "lora__init": "pissa",
    "lora__rank_pattern": "q_proj=7,mlp.*=2",
    "lora__dropout_pattern": "mlp.*=0.1",
    "optim__loraplus_lr_ratio": 4.0,
}

JUDGED = {
    **SHAPE,
    "train__max_steps": 30,
    "optim__learning_rate": 0.1,
    "eval__every": 8,
    "eval__adaptive": True,
    "eval__finest": 2,
    "checkpoint__best": 3,
    "checkpoint__best_by": "token_accuracy",
    "stop__patience": 3,
    "stop__min_delta": 1.0,
    "stop__min_delta_unit": "standard_errors",
}


@pytest.fixture(scope="module")
def nursery():
    with commands.nursery() as process:
        yield process


@pytest.fixture
def command(nursery, tmp_path) -> Command:
    return Command(nursery, tmp_path / "output.txt")


@pytest.fixture(scope="module")
def undisturbed(nursery, project, tmp_path_factory) -> Callable[[dict[str, Any]], Path]:
    """The folder of the run with these settings that nobody disturbed; each is made once."""
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("undisturbed")

    def run(settings: dict[str, Any]) -> Path:
        name = json.dumps(settings)
        if name not in made:
            workdir = folder / str(len(made))
            command = Command(nursery, folder / f"{len(made)}.txt")
            assert command.run(project.arguments(workdir, **settings)) == 0, command.output
            made[name] = workdir
        return made[name]

    return run


@pytest.mark.slow
def test_killed_five_times_and_stopping_early(command, undisturbed, project, tmp_path):
    """Before the first checkpoint, in an evaluation, twice while the folder is written, and from outside."""
    expected = undisturbed(PATIENCE)
    assert json.loads((expected / "record.json").read_text())["status"] == "stopped_early"
    workdir, chance = tmp_path / "run", random.Random(5)
    arguments = project.arguments(workdir, **PATIENCE)
    inside = [
        ["jaxlora.data.batches:Batches.batch", 2],
        # 40 batches an evaluation, of both data sets: in that of step 6, when a checkpoint is sure to be whole.
        ["jaxlora.training.evaluate:_Sums.add", chance.randint(121, 160)],
        [str(workdir / "checkpoints"), chance.randint(1, 100)],
        [str(workdir), chance.randint(20, 150)],
    ]
    starts = []
    for die in inside:
        assert command.run(arguments, die=die) == -signal.SIGKILL, command.output
        starts.append(command.output)
    command.start(arguments)
    wait_for_step(command, workdir, last_step(workdir) + chance.randint(1, 2))
    time.sleep(chance.uniform(0, 0.03))
    os.kill(command.pid, signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL, command.output
    assert command.run(arguments) == 0, command.output
    starts.append(command.output)

    assert "starting afresh" in starts[1]
    assert all("going on after step" in output for output in starts[2:]), starts
    assert not any("damaged" in output for output in starts)
    assert_same(workdir, expected)


@pytest.mark.slow
def test_what_is_judged_by_earlier_evaluations_goes_on_as_it_was(command, undisturbed, project, tmp_path):
    """The adaptive calendar, improvements in standard errors, the alarm and the best few all look back."""
    expected = undisturbed(JUDGED)
    curve = [json.loads(line) for line in (expected / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in curve if "eval/nll" in line]
    assert len({b - a for a, b in itertools.pairwise(evaluated)}) > 1, evaluated
    workdir = tmp_path / "run"
    arguments = project.arguments(workdir, **JUDGED)
    for die in (
        ["jaxlora.training.evaluate:_Sums.add", 25],
        ["jaxlora.training.stopping:EarlyStop.__call__", 3],
        [str(workdir / "checkpoints"), 60],
    ):
        assert command.run(arguments, die=die) == -signal.SIGKILL, command.output
    assert command.run(arguments) == 0, command.output
    assert_same(workdir, expected)
    record = json.loads((workdir / "record.json").read_text())
    accuracy = {line["step"]: line["eval/token_accuracy"] for line in curve if "eval/nll" in line}
    ranked = sorted(accuracy, key=lambda step: (-accuracy[step], step))
    assert [entry["step"] for entry in record["bests"]] == ranked[:3]
    assert record["best"] == record["bests"][0]


@pytest.mark.slow
def test_every_variant_goes_on_as_it_was(command, undisturbed, project, tmp_path):
    """DoRA's magnitudes, PiSSA's anchor, ranks, dropouts and rates by module: all of it is in the checkpoint."""
    expected = undisturbed(SHAPE | VARIANTS)
    arguments = project.arguments(tmp_path / "run", **SHAPE, **VARIANTS)
    assert command.run(arguments, die=[str(tmp_path / "run/checkpoints"), 40]) == -signal.SIGKILL, (
        command.output
    )
    assert command.run(arguments) == 0, command.output
    assert "going on after step" in command.output
    assert_same(tmp_path / "run", expected)
    said = json.loads((expected / "best/adapter_config.json").read_text())
    assert (said["r"], said["rank_pattern"], said["use_dora"]) == (2 * 7, {}, True)
    curve = [json.loads(line) for line in (expected / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval/nll"] for line in curve if "eval/nll" in line]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kept", [{"model__quantize": "nf4"}, {"model__quantize": "int8", "model__quantize_embeddings": "nf4"}]
)
def test_over_a_base_in_four_bits_too(command, undisturbed, project, tmp_path, kept):
    """It is quantised anew at every start, to the same bits."""
    settings = SHAPE | kept
    expected = undisturbed(settings)
    arguments = project.arguments(tmp_path / "run", **settings)
    assert command.run(arguments, die=[str(tmp_path / "run/checkpoints"), 40]) == -signal.SIGKILL, (
        command.output
    )
    assert command.run(arguments) == 0, command.output
    assert "going on after step" in command.output
    assert_same(tmp_path / "run", expected)


@pytest.fixture
def left(command, project, tmp_path) -> Path:
    """A run that was asked to leave by SIGTERM, after it had saved more than once."""
    workdir = tmp_path / "run"
    command.start(project.arguments(workdir, **SHAPE))
    wait_for_step(command, workdir, 6)
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait() == 0, command.output
    return workdir


@pytest.mark.slow
def test_asked_to_leave(command, undisturbed, project, left):
    record = json.loads((left / "record.json").read_text())
    arguments = project.arguments(left, **SHAPE)
    assert record["status"] == "preempted"
    assert 6 <= record["steps"] < 16
    assert "SIGTERM" in command.output
    assert f"to go on          python -m jaxlora.train {' '.join(arguments)}" in command.output

    command.start(arguments)
    wait_for_step(command, left, record["steps"] + 1)
    os.kill(command.pid, signal.SIGINT)
    assert command.wait() == 0, command.output
    assert "SIGINT" in command.output
    assert json.loads((left / "record.json").read_text())["status"] in ("preempted", "finished")
    assert f"going on after step {record['steps']}" in command.output

    assert command.run(arguments) == 0, command.output
    assert_same(left, undisturbed(SHAPE))
    # The train and the evaluation step at least; what compiles in less than half a second is not kept.
    assert int(command.output.rpartition("found in the cache: ")[2]) >= 2


@pytest.mark.slow
def test_newest_checkpoint_cut_short(command, undisturbed, project, left):
    """The one before is used, which is said, and the run ends as if nothing had been lost."""
    steps = sorted(int(entry.name) for entry in (left / "checkpoints").iterdir())
    newest = left / "checkpoints" / str(steps[-1])
    for file in (newest / "state").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    assert command.run(project.arguments(left, **SHAPE)) == 0, command.output
    assert f"{newest} is damaged" in command.output
    assert "passed over" in command.output
    assert f"going on after step {steps[-2]}" in command.output
    assert_same(left, undisturbed(SHAPE))


@pytest.mark.slow
def test_all_checkpoints_cut_short(command, undisturbed, project, left):
    for file in (left / "checkpoints").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    assert command.run(project.arguments(left, **SHAPE)) == 0, command.output
    assert "starting afresh" in command.output
    assert_same(left, undisturbed(SHAPE))


@pytest.mark.slow
def test_a_run_that_has_ended_is_left_alone(call, undisturbed, project, tmp_path):
    workdir = Path(shutil.copytree(undisturbed(SHAPE), tmp_path / "run"))
    before = contents(workdir)
    ended = call(project.arguments(workdir, **SHAPE))
    assert ended.code == 0
    assert f"{workdir}: this run has ended (finished: all 16 steps done)" in ended.out
    assert f"python -m jaxlora.generate --run {workdir}" in ended.out
    assert contents(workdir) == before
