"""Killed or asked to leave, wherever it is just then, a run ends with the bytes of an undisturbed one.

Two runs at a time are struck by one fault after another, and resumed after each by the same command. A run that has
ended is compared, and another one begun, until every fault has happened.
"""

import collections
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.train import commands
from tests.train.commands import Command, assert_same, last_step
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
    "starting": ("jaxlora.config.build.programs:compile_programs", 1),
    "restoring": ("jaxlora.runs.checkpoints:Checkpoints.restore", 1),
    "dropping what came after": ("jaxlora.runs.directory:RunDirectory.truncate", 1),
}
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
        fault = waiting.popleft() if waiting else None
        saved = [int(entry.name) for entry in (workdir / "checkpoints").glob("*") if entry.name.isdigit()]
        arguments = project.arguments(workdir, **SETTINGS)
        code = fault.befalls(command, arguments, workdir) if fault else command.run(arguments)
        record = workdir / "record.json"
        status = json.loads(record.read_text())["status"] if record.exists() else ""
        said = command.output
        assert "Traceback" not in said, said
        assert "damaged" not in said, said  # a kill damages nothing: what is not complete was never there
        if saved and "training and evaluation steps:" in said:
            assert f"going on after step {max(saved)}\n" in said, (fault, said)
        if fault and fault.happened(code, status):
            survived.append(fault)
            continue
        assert code == 0, (fault, said)
        assert status in ENDED, (fault, said)
        assert_same(workdir, undisturbed)
        if fault:
            waiting.append(fault)
    return survived


@pytest.fixture
def two_commands(tmp_path) -> Iterator[list[Command]]:
    with commands.nursery() as one, commands.nursery() as other:
        yield [Command(one, tmp_path / "one.txt"), Command(other, tmp_path / "other.txt")]


@pytest.mark.slow
def test_whatever_befalls_a_run_it_ends_as_an_undisturbed_one(two_commands, project, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    assert two_commands[0].run(project.arguments(undisturbed, **SETTINGS)) == 0, two_commands[0].output
    assert json.loads((undisturbed / "record.json").read_text())["status"] == "stopped_early"

    faults = drawn(random.Random(8))
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        halves = [
            pool.submit(survive, command, project, tmp_path / str(i), undisturbed, faults[i::2])
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
