"""A sweep that was killed, and then repeated, leaves the bytes of one that nobody disturbed."""

import json
import os
import random
import signal
from pathlib import Path

import pytest

from tests.sweeps.conftest import curve
from tests.sweeps.killed import TRIALS
from tests.train import commands
from tests.train.commands import Command, contents


@pytest.fixture(scope="module")
def nursery():
    with commands.nursery() as process:
        yield process


@pytest.fixture(scope="module")
def undisturbed(nursery, config_file, tmp_path_factory) -> dict[int, Path]:
    """Trials at once -> the folder of a sweep: one stack, and three whose trials wait for each other at the rung."""
    folders = {}
    for at_once in (0, 2):
        folder = tmp_path_factory.mktemp("undisturbed")
        command = Command(nursery, folder / "output.txt")
        arguments = [str(config_file), str(folder / "sweep"), str(at_once)]
        assert command.run(arguments, module="tests.sweeps.killed") == 0, command.output
        folders[at_once] = folder / "sweep"
    return folders


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "record.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [0, 2])
def test_what_becomes_of_each(undisturbed, at_once):
    """One stops early, one diverges; of the four that are left at the rung two go on."""
    folder = undisturbed[at_once]
    ends = {name: (record(folder, name)["status"], record(folder, name)["steps"]) for name in TRIALS}
    assert ends.pop("stops") == ("stopped_early", 2)
    status, step = ends.pop("diverges")
    assert (status, step < 7) == ("diverged", True)
    dropped = [name for name in ends if ends[name] == ("preempted", 7)]
    assert [ends[name] for name in ends if name not in dropped] == [("finished", 14)] * 2
    ledger = json.loads((folder / "sweep.json").read_text())
    assert len(ledger["stacks"]) == (1 if at_once == 0 else 3)
    assert list(ledger["rungs"]) == ["0/1"]
    assert sorted(ledger["rungs"]["0/1"]["dropped"]) == sorted(dropped)
    for name in dropped:
        reason = record(folder, name)["reason"]
        assert "dropped at rung 1 (step 7): eval nll" in reason
        assert reason.endswith(f"python -m jaxlora.train --workdir {folder / name}")
        assert (folder / name / "checkpoints" / "7").is_dir()
    assert sorted(file.stem for file in (folder / ".rungs").glob("*.json")) == sorted(dropped)


@pytest.mark.slow
def test_who_goes_on_does_not_depend_on_how_many_fit_at_once(undisturbed):
    together, apart = undisturbed[0], undisturbed[2]
    told = [json.loads((folder / "sweep.json").read_text())["rungs"]["0/1"] for folder in (together, apart)]
    assert told[0]["dropped"].keys() == told[1]["dropped"].keys()
    for name in TRIALS:
        if name == "diverges":
            continue
        assert record(together, name)["status"] == record(apart, name)["status"]
        one, other = (curve(folder / name, "train/nll", "eval/nll") for folder in (together, apart))
        assert len(one) == len(other)
        for line, same in zip(one, other, strict=True):
            assert line == pytest.approx(same, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [0, 2])
def test_killed_again_and_again(nursery, config_file, undisturbed, tmp_path, at_once):
    """In evaluations, while folders are written, at the rung, and in what goes on after it."""
    chance = random.Random(7)
    command = Command(nursery, tmp_path / "output.txt")
    folder, expected_folder = tmp_path / "sweep", undisturbed[at_once]
    arguments = [str(config_file), str(folder), str(at_once)]
    places = [
        ["jaxlora.training.evaluate:_Sums.add", chance.randint(70, 90) if at_once == 0 else 30],
        ["jaxlora.sweeps.ledger:Ledger.decide", 1],
        [str(folder / "b" / "checkpoints"), chance.randint(40, 80) if at_once == 0 else 15],
        [str(folder / "a" / "record.json"), 5 if at_once == 0 else 2],
    ]
    if at_once:
        places.insert(1, ["jaxlora.sweeps.ledger:Ledger.wait", 2])  # one is noted, the one beside it is not
        places.insert(3, ["jaxlora.sweeps.ledger:Ledger.end_wait", 3])  # decided, and half of it done
    for die in places:
        code = command.run(arguments, module="tests.sweeps.killed", die=die)
        assert code == -signal.SIGKILL, (die, command.output)
    assert command.run(arguments, module="tests.sweeps.killed") == 0, command.output
    for name in TRIALS:
        found, expected = contents(folder / name), contents(expected_folder / name)
        assert found.keys() == expected.keys()
        for file in found:  # a reason of one that was dropped names its folder
            there = found[file].replace(bytes(folder), bytes(expected_folder))
            assert there == expected[file], (name, file)
        steps, others = ({*os.listdir(each / name / "checkpoints")} for each in (folder, expected_folder))
        assert steps == others
    told, other = ((each / "sweep.json").read_text() for each in (folder, expected_folder))
    assert told.replace(str(folder), str(expected_folder)) == other


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [0, 2])
def test_repeated_when_it_has_ended(nursery, config_file, undisturbed, tmp_path, at_once):
    folder = undisturbed[at_once]
    before = {name: contents(folder / name) for name in TRIALS}
    command = Command(nursery, tmp_path / "output.txt")
    arguments = [str(config_file), str(folder), str(at_once)]
    assert command.run(arguments, module="tests.sweeps.killed") == 0
    assert before == {name: contents(folder / name) for name in TRIALS}
    assert "compiling" not in command.output
