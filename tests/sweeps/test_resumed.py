"""A sweep that was killed, and then repeated, leaves the bytes of one that nobody disturbed."""

import json
import os
import random
import signal
from pathlib import Path

import pytest

from tests.sweeps.killed import TRIALS
from tests.train import commands
from tests.train.commands import Command, contents


@pytest.fixture(scope="module")
def nursery():
    with commands.nursery() as process:
        yield process


@pytest.fixture(scope="module")
def undisturbed(nursery, config_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    command = Command(nursery, folder / "output.txt")
    arguments = [str(config_file), str(folder / "sweep")]
    assert command.run(arguments, module="tests.sweeps.killed") == 0, command.output
    return folder / "sweep"


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "record.json").read_text())


@pytest.mark.slow
def test_what_becomes_of_each(undisturbed):
    """One stops early, one diverges; of the four that are left at the rung two go on."""
    ends = {
        name: (record(undisturbed, name)["status"], record(undisturbed, name)["steps"]) for name in TRIALS
    }
    assert ends.pop("stops") == ("stopped_early", 2)
    status, step = ends.pop("diverges")
    assert (status, step < 7) == ("diverged", True)
    dropped = [name for name in ends if ends[name] == ("preempted", 7)]
    assert [ends[name] for name in ends if name not in dropped] == [("finished", 14)] * 2
    ledger = json.loads((undisturbed / "sweep.json").read_text())
    assert list(ledger["rungs"]) == ["0/1"]
    assert sorted(ledger["rungs"]["0/1"]["dropped"]) == sorted(dropped)
    for name in dropped:
        reason = record(undisturbed, name)["reason"]
        assert "dropped at rung 1 (step 7): eval nll" in reason
        assert reason.endswith(f"python -m jaxlora.train --workdir {undisturbed / name}")
        assert (undisturbed / name / "checkpoints" / "7").is_dir()


@pytest.mark.slow
def test_killed_again_and_again(nursery, config_file, undisturbed, tmp_path):
    """In evaluations, while folders are written, at the rung, and in the smaller stack."""
    chance = random.Random(7)
    command = Command(nursery, tmp_path / "output.txt")
    folder = tmp_path / "sweep"
    arguments = [str(config_file), str(folder)]
    places = [
        ["jaxlora.training.evaluate:_Sums.add", chance.randint(70, 90)],
        ["jaxlora.sweeps.ledger:Ledger.decide", 1],
        [str(folder / "b" / "checkpoints"), chance.randint(40, 80)],
        [str(folder / "a" / "record.json"), 5],
    ]
    outputs = []
    for die in places:
        code = command.run(arguments, module="tests.sweeps.killed", die=die)
        outputs.append(command.output)
        assert code == -signal.SIGKILL, command.output
    assert command.run(arguments, module="tests.sweeps.killed") == 0, command.output
    for name in TRIALS:
        found, expected = contents(folder / name), contents(undisturbed / name)
        assert found.keys() == expected.keys()
        for file in found:  # a reason of one that was dropped names its folder
            there = found[file].replace(bytes(folder), bytes(undisturbed))
            assert there == expected[file], (name, file)
        steps, others = ({*os.listdir(each / name / "checkpoints")} for each in (folder, undisturbed))
        assert steps == others
    told, other = ((each / "sweep.json").read_text() for each in (folder, undisturbed))
    assert told.replace(str(folder), str(undisturbed)) == other


@pytest.mark.slow
def test_repeated_when_it_has_ended(nursery, config_file, undisturbed, tmp_path):
    before = {name: contents(undisturbed / name) for name in TRIALS}
    command = Command(nursery, tmp_path / "output.txt")
    assert command.run([str(config_file), str(undisturbed)], module="tests.sweeps.killed") == 0
    assert before == {name: contents(undisturbed / name) for name in TRIALS}
    assert "compiling" not in command.output
