"""The sweep command with nothing in anybody's place: from a sweep's file to folders that every other command takes."""

import contextlib
import io
import json
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from jaxlora import evaluate, sweep, train
from jaxlora.core import cli
from tests.sweeps.conftest import see_devices
from tests.train.commands import Command, contents, nursery

pytestmark = pytest.mark.slow
NAMES = ["learning_rate=0.02", "learning_rate=0.01", "learning_rate=1e-06"]


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def done(command, *arguments: str) -> Done:
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as out, io.StringIO() as err:
        patch.setattr(sys, "argv", [command.__name__, *arguments])
        streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with streams[0], streams[1], see_devices(1), pytest.raises(SystemExit) as left:
            cli.run(command.main)
        return Done(left.value.code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def swept(config_file, tmp_path_factory) -> tuple[Path, Path, Done]:
    """Three rates over eight steps; the hopeless one is dropped halfway. The sweep's file, its folder, and the end."""
    here = tmp_path_factory.mktemp("whole")
    file, folder = here / "rates.py", here / "rates"
    file.write_text(
        "from jaxlora.config.sweep import sweep_config\n\n\ndef get_config():\n"
        f"    config = sweep_config({str(config_file)!r})\n"
        "    config.base.train.max_steps = 8\n    config.base.eval.every = 4\n"
        "    config.sweep.grid = {'optim.learning_rate': [1e-6, 1e-2, 2e-2]}\n"
        "    config.sweep.halving.rungs = (0.5,)\n"
        "    return config\n"
    )
    return file, folder, done(sweep, "--config", str(file), "--workdir", str(folder))


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "record.json").read_text())


def test_the_ranking_is_that_of_the_folders(swept):
    _, folder, ended = swept
    assert ended.code == 0, ended.err
    lines = ended.out[ended.out.index("ranking\n") :].splitlines()[2:5]
    assert sorted(NAMES) == sorted(line.split()[0] for line in lines)
    best = [record(folder, line.split()[0])["best"]["eval/nll"] for line in lines]
    assert best == sorted(best)
    assert [line.split()[1] for line in lines] == [f"{nll:.4f}" for nll in best]
    assert f"generate --run {folder}/{lines[0].split()[0]}" in ended.out


def test_the_hopeless_one_was_dropped_and_says_how_to_go_on(swept):
    _, folder, ended = swept
    assert re.search(r"^  learning_rate=1e-06 .* 4 +dropped$", ended.out, re.MULTILINE)
    found = record(folder, "learning_rate=1e-06")
    assert (found["status"], found["steps"]) == ("preempted", 4)
    assert found["reason"].endswith(f"python -m jaxlora.train --workdir {folder / 'learning_rate=1e-06'}")


def test_each_trial_is_a_run_to_other_commands(swept):
    _, folder, _ = swept
    ended = done(evaluate, "--run", str(folder / "learning_rate=0.01"))
    assert ended.code == 0, ended.err
    now, then = re.search(
        r"^  nll +(\S+) +(\S+)$", ended.out, re.MULTILINE
    ).groups()  # and as the run itself saw it
    assert float(now) == pytest.approx(float(then), rel=1e-5)
    assert float(then) == pytest.approx(record(folder, "learning_rate=0.01")["best"]["eval/nll"], rel=1e-5)


def test_a_dropped_trial_is_finished_by_its_folder_alone(swept, tmp_path):
    file, folder = swept[0], Path(shutil.copytree(swept[1], tmp_path / "copied"))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        listener := lambda name, *_, **__: compiled.append(name)
    )
    again = done(sweep, "--config", str(file), "--workdir", str(folder))
    jax.monitoring.unregister_event_duration_listener(listener)
    assert again.code == 0, again.err
    assert "/jax/core/compile/backend_compile_duration" not in compiled
    alone = done(train, "--workdir", str(folder / "learning_rate=1e-06"))
    assert alone.code == 0, alone.err
    assert "going on after step 4" in alone.out
    assert record(folder, "learning_rate=1e-06")["status"] == "finished"
    again = done(sweep, "--config", str(file), "--workdir", str(folder))
    assert re.search(r"^  learning_rate=1e-06 .* 8 +finished$", again.out, re.MULTILINE)


def test_a_request_saves_all_and_the_same_command_goes_on(swept, tmp_path):
    """The request comes while a trial writes what it made of its first step; all leave after the third."""
    file, undisturbed, _ = swept
    folder = tmp_path / "sweep"
    arguments = ["--config", str(file), "--workdir", str(folder)]
    with nursery() as process:
        command = Command(process, tmp_path / "output.txt")
        # Three evaluations and three lines of step 1; what is told of a step comes while the next one runs.
        request = ["jaxlora.training.recording:Recorder.metrics", 5, [signal.SIGTERM]]
        assert command.run(arguments, module="jaxlora.sweep", die=request) == 0, command.output
        assert "SIGTERM: saving after this step and leaving" in command.output
        assert "not written" not in command.output
        for name in NAMES:
            assert (record(folder, name)["status"], record(folder, name)["steps"]) == ("preempted", 3)
            assert (folder / name / "checkpoints/3").is_dir()
        assert command.run(arguments, module="jaxlora.sweep") == 0, command.output
        assert "going on after step 3" in command.output
    for name in NAMES:
        found, expected = contents(folder / name), contents(undisturbed / name)
        found["record.json"] = found["record.json"].replace(
            bytes(folder), bytes(undisturbed)
        )  # in why it was dropped
        assert found == expected


def test_wrong_input_of_a_trial_names_the_bases_key(config_file, tmp_path):
    file = tmp_path / "long.py"
    file.write_text(
        "from jaxlora.config.sweep import sweep_config\n\n\ndef get_config():\n"
        f"    config = sweep_config({str(config_file)!r})\n"
        "    config.sweep.grid = {'seed': [0, 1]}\n"
        "    return config\n"
    )
    ended = done(
        sweep, "--config", str(file), "--workdir", str(tmp_path / "s"), "--config.base.data.max_length=65"
    )
    assert ended.code == 2
    assert "--config.base.data.max_length=64" in ended.err
