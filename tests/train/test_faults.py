"""Killed or asked to leave, wherever it is just then, a run ends with the bytes of an undisturbed one.

Two runs at a time are struck by one fault after another, and resumed after each by the same command. A run that has
ended is compared, and another one begun, until every fault has happened.
"""

import collections
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.train import commands
from tests.train.commands import Command, assert_same, last_step, wait_until_stopped
from tests.train.conftest import Project

# It evaluates, answers, saves, counts its patience and stops early: much to be interrupted in.
SETTINGS = {
    "optim__learning_rate": 0.1,
    "lora__dropout": 0.1,
    "train__max_steps": 60,
    "eval__every": 3,
    "eval__batch_size": 2,
    "eval__generate": 4,
    "eval__max_new_tokens": 3,
    "stop__patience": 3,
    "stop__min_steps": 24,
    "checkpoint__every": 2,
    "log__every": 2,
}
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
ENDED = ("finished", "stopped_early")

# What is struck -> where, and up to how many calls or touches later. What begins with "/" is in the run folder.
PLACES = {
    "in a step": ("jaxlora.data.batches:Batches.batch", 6),
    "in an evaluation": ("jaxlora.data.batches:EvalBatches.batch", 20),
    "answering": ("jaxlora.training.answers:left_pad", 3),
    "writing best/": ("/.best.new", 4),
    "writing last/": ("/.last.new", 6),
    "writing eval/": ("/eval/", 6),
    "writing metrics.jsonl": ("/metrics.jsonl", 6),
    "writing record.json": ("/record.json", 6),
    "saving": ("/checkpoints/", 60),
    "finishing a save": ("orbax.checkpoint.checkpoint_manager:CheckpointManager._finalize", 3),
    "starting": ("jaxlora.config.build.inputs:base", 1),
    "restoring": ("jaxlora.runs.checkpoints:Checkpoints.restore", 1),
    "dropping what came after": ("jaxlora.runs.directory:RunDirectory.truncate", 1),
}
RESUMING = ("restoring", "dropping what came after")
AT_ANY_MOMENT = "at a random moment"
HOW_MANY = {
    "SIGKILL": dict.fromkeys(PLACES, 1)
    | {"saving": 6, "in a step": 2, "in an evaluation": 2, AT_ANY_MOMENT: 8},
    "SIGTERM": {"in a step": 1, "in an evaluation": 1, "answering": 1, "saving": 1, AT_ANY_MOMENT: 2},
    "SIGINT": {"in an evaluation": 1, "saving": 1, AT_ANY_MOMENT: 1},
    "SIGTERM twice": {"in a step": 1, "in an evaluation": 1},
    "SIGINT twice": {"in an evaluation": 1},
}
SIGNALS = {
    "SIGKILL": (KILL,),
    "SIGTERM": (TERM,),
    "SIGINT": (INT,),
    "SIGTERM twice": (TERM, TERM),
    "SIGINT twice": (INT, INT),
}


class Fault(NamedTuple):
    """One disturbance: which signals, where, and at which call or touch of the place (or after how many seconds)."""

    kind: str
    place: str
    when: float

    def befalls(self, command: Command, arguments: list[str], workdir: Path) -> int:
        """Starts the command, which it then befalls; returns the exit code."""
        signals = SIGNALS[self.kind]
        if self.place != AT_ANY_MOMENT:
            where = PLACES[self.place][0]
            place = f"{workdir}{where}" if where.startswith("/") else where
            return command.run(arguments, die=[place, int(self.when), [int(number) for number in signals]])
        before = last_step(workdir)
        command.start(arguments)
        try:
            # A request is one only once training has begun; a kill may come before that, too.
            while signals != (KILL,) and last_step(workdir) <= max(before, 0):
                os.kill(command.pid, 0)
                time.sleep(0.002)
            time.sleep(self.when)
            for number in signals:
                os.kill(command.pid, number)
        except ProcessLookupError:  # it has ended meanwhile
            pass
        return command.wait()

    def happened(self, code: int, status: str) -> bool:
        """Whether the command ended by the fault, as it should; the other way to end is the run's own."""
        signals = SIGNALS[self.kind]
        if signals in ((TERM,), (INT,)):
            return code == 0 and status == "preempted"
        return code == -signals[-1]


def drawn(chance: random.Random) -> list[Fault]:
    """All faults of `HOW_MANY`, in random order, each at a random place or moment."""
    faults = [
        Fault(kind, place, chance.uniform(0, 5 if kind == "SIGKILL" else 0.3))
        if place == AT_ANY_MOMENT
        else Fault(kind, place, chance.randint(1, PLACES[place][1]))
        for kind, places in HOW_MANY.items()
        for place, count in places.items()
        for _ in range(count)
    ]
    chance.shuffle(faults)
    return faults


def survive(
    command: Command, project: Project, folder: Path, undisturbed: Path, faults: list[Fault]
) -> list[Fault]:
    """Strikes runs with all the faults, one after another; each run that ends must equal the undisturbed one."""
    waiting, survived, runs = collections.deque(faults), list[Fault](), 0
    workdir, status = folder, "finished"
    while waiting or status not in ENDED:
        if status in ENDED:
            runs += 1
            assert runs < 8, f"these never happen: {waiting}"
            workdir = folder / str(runs)
            if waiting[0].place in RESUMING:  # which takes something to resume; not counted
                command.run(project.arguments(workdir, **SETTINGS), die=[PLACES["in a step"][0], 4])
        fault = waiting.popleft() if waiting else None
        saved = [int(entry.name) for entry in (workdir / "checkpoints").glob("*") if entry.name.isdigit()]
        arguments = project.arguments(workdir, **SETTINGS)
        code = fault.befalls(command, arguments, workdir) if fault else command.run(arguments)
        record = workdir / "record.json"
        status = json.loads(record.read_text())["status"] if record.exists() else ""
        said = command.output
        assert "Traceback" not in said, said
        assert "damaged" not in said, said  # a kill damages nothing: what is not complete was never there
        if saved and "what will be done" in said:
            assert f"going on after step {max(saved)}\n" in said, (fault, said)
        if fault and fault.happened(code, status):
            survived.append(fault)
            print(fault, record.exists() and json.loads(record.read_text()).get("steps"), flush=True)
            continue
        assert code == 0, (fault, said)
        assert status in ENDED, (fault, said)
        assert_same(workdir, undisturbed, same_saves=False)
        assert (workdir / "checkpoints" / str(json.loads(record.read_text())["best"]["step"])).is_dir()
        if fault:
            waiting.append(fault)
    return survived


@pytest.fixture(scope="module")
def nurseries():
    with commands.nursery() as one, commands.nursery() as other:
        yield one, other


@pytest.fixture
def two_commands(nurseries, tmp_path) -> Iterator[list[Command]]:
    found = [Command(nursery, tmp_path / f"{i}.txt") for i, nursery in enumerate(nurseries)]
    yield found
    for command in found:
        command.kill()


@pytest.fixture(scope="module")
def undisturbed(nurseries, project, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    command = Command(nurseries[0], folder / "output.txt")
    assert command.run(project.arguments(folder / "run", **SETTINGS)) == 0, command.output
    assert json.loads((folder / "run/record.json").read_text())["status"] == "stopped_early"
    return folder / "run"


@pytest.mark.slow
def test_whatever_befalls_a_run_it_ends_as_an_undisturbed_one(two_commands, undisturbed, project, tmp_path):
    faults = drawn(random.Random(8))
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        halves = [
            pool.submit(survive, command, project, tmp_path / f"by {i}", undisturbed, faults[i::2])
            for i, command in enumerate(two_commands)
        ]
        survived = [fault for half in halves for fault in half.result()]

    counts = {
        kind: dict(collections.Counter(f.place for f in survived if f.kind == kind)) for kind in HOW_MANY
    }
    for kind, places in counts.items():
        print(f"{kind}: {sum(places.values())} ({', '.join(f'{n} {place}' for place, n in places.items())})")
    print(f"{len(survived)} faults survived in {time.monotonic() - began:.0f} s")
    assert counts == HOW_MANY
    assert sum(sum(places.values()) for kind, places in counts.items() if "twice" not in kind) >= 30


def turn_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the arrays": lambda step: turn_a_bit(
        max((step / "state/d").iterdir(), key=lambda f: f.stat().st_size)
    ),
    "a bit of the standing": lambda step: turn_a_bit(step / "host/metadata"),
    "what the arrays are, cut": lambda step: os.truncate(step / "state/_METADATA", 500),
    "where the arrays are, gone": lambda step: (step / "state/manifest.ocdbt").unlink(),
}


@pytest.mark.slow
def test_killed_and_its_newest_checkpoint_damaged(two_commands, undisturbed, project, tmp_path):
    struck = tmp_path / "struck"
    place = ["jaxlora.data.batches:EvalBatches.batch", 60]
    assert two_commands[0].run(project.arguments(struck, **SETTINGS), die=place) == -KILL
    *_, before, newest = sorted(
        int(entry.name) for entry in (struck / "checkpoints").iterdir() if entry.name.isdigit()
    )

    def resume(command: Command, names: list[str]) -> None:
        for name in names:
            workdir = Path(shutil.copytree(struck, tmp_path / name))
            DAMAGES[name](workdir / "checkpoints" / str(newest))
            assert command.run(project.arguments(workdir, **SETTINGS)) == 0, command.output
            assert command.output.count("is damaged (") == 1, command.output
            assert f"checkpoint {workdir / 'checkpoints' / str(newest)} is damaged (" in command.output
            assert f"going on after step {before}\n" in command.output
            assert "Traceback" not in command.output
            assert_same(workdir, undisturbed)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(resume, c, list(DAMAGES)[i::2]) for i, c in enumerate(two_commands)]:
            done.result()


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_is_dead(two_commands, undisturbed, project, tmp_path):
    first, second = two_commands
    arguments = project.arguments(tmp_path / "run", **SETTINGS)
    first.start(arguments, stop=[["jaxlora.data.batches:Batches.batch", 12]])
    wait_until_stopped(first)
    assert second.run(arguments) == 2
    (line,) = (line for line in second.output.splitlines() if line.startswith("error: "))
    assert f"is in use by process {first.pid} on " in line
    os.kill(first.pid, KILL)
    assert first.wait() == -KILL
    assert second.run(arguments) == 0, second.output
    assert "going on after step" in second.output
    assert_same(tmp_path / "run", undisturbed)
