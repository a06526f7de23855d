"""`--profile START:END`: which steps are traced, where the trace lies, and that the run is the same."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from jaxlora.data.batches import Batches
from tests.train.commands import assert_same, last_step

STOPS_EARLY = {"optim__learning_rate": 0.1, "train__max_steps": 60, "eval__every": 2, "stop__patience": 2}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


def traced(workdir: Path) -> list[list[int]]:
    """The numbers of the steps in each trace of a run, by the time of the trace."""
    found = []
    for file in sorted(workdir.glob("tensorboard/plugins/profile/*/*.xplane.pb")):
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events]
        marks = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
        assert any("ThunkExecutor" in event.name for event in events), "nothing of what was computed"
        found.append(sorted(int(mark) for mark in marks))
    return found


def stopped_at(workdir: Path) -> int:
    return json.loads((workdir / "record.json").read_text())["steps"]


def test_steps_are_traced_and_the_run_is_the_same(project, call, tmp_path):
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    assert call(project.arguments(plain)).code == 0
    ended = call([*project.arguments(profiled), "--profile", "3:4"])
    assert ended.code == 0
    assert traced(profiled) == [[3, 4]]
    assert (
        f"profile of steps 3 to 4: xprof --logdir {profiled}/tensorboard shows it (docs/profile.md)"
        in ended.out
    )
    assert re.search(r"to go on +python -m jaxlora\.train (?!.*--profile)", ended.out)
    assert_same(profiled, plain)
    assert traced(plain) == []


def test_nothing_is_waited_for_to_end_a_trace(project, call, tmp_path, monkeypatch):
    """Or the step before the last would seem to take two steps' time, and the last one none."""
    workdir, ended, stop = tmp_path / "run", [], jax.profiler.stop_trace

    def stopping():
        ended.append(last_step(workdir))
        stop()

    monkeypatch.setattr(jax.profiler, "stop_trace", stopping)
    assert call([*project.arguments(workdir, eval__every=6), "--profile", "3:4"]).code == 0
    assert ended == [3]  # the numbers of step 3 were looked at, and told, in their turn


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("3", "--profile 3 is no range of steps.\nGive it as START:END"),
        ("3:", "--profile 3: is no range of steps"),
        ("a:b", "--profile a:b is no range of steps"),
        ("-1:3", "is no range of steps"),
        ("0:3", "--profile 0:3: steps count from 1.\nGive it as"),
        ("5:4", "--profile 5:4: the end is before the start.\nGive it as"),
        ("5:7", "--profile 5:7 goes past the end: the run's last step is 6.\n"
                "Give steps from 1 to 6, for example --profile 4:6."),
        ("7:90", "the run's last step is 6.\nGive steps from 1 to 6, for example --profile 1:6."),
    ],
)  # fmt: skip
def test_steps_that_there_are_not_are_refused(project, call, tmp_path, given, said):
    ended = call([*project.arguments(tmp_path / "run"), f"--profile={given}"])
    assert ended.code == 2
    assert said in ended.err
    assert len(ended.err.splitlines()) == 2
    assert not (tmp_path / "run").exists()


def leave_before(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], None]:
    """Has the run asked to leave when it reads the rows of a step; returns what ends that."""
    batch = Batches.batch

    def leaving(self: Batches, number: int, *rows):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, number, *rows)

    monkeypatch.setattr(Batches, "batch", leaving)
    return lambda: monkeypatch.setattr(Batches, "batch", batch)


@pytest.mark.slow
def test_a_run_that_is_asked_to_leave_writes_what_it_has_and_goes_on_with_the_rest(
    project, call, tmp_path, monkeypatch
):
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    assert call(project.arguments(plain)).code == 0
    arguments = project.arguments(profiled)
    stay = leave_before(monkeypatch, 4)
    first = call([*arguments, "--profile", "2:5"])
    assert first.code == 0
    left = stopped_at(profiled)
    assert 2 <= left < 5
    assert traced(profiled) == [list(range(2, left + 1))]
    stay()

    early = call([*arguments, "--profile", f"1:{left}"])
    assert early.code == 2
    assert early.err.splitlines() == [
        f"error: --profile 1:{left}: the run goes on after step {left}, these were made before.",
        f"Give steps from {left + 1} to 6, for example --profile {left + 1}:6.",
    ]
    second = call([*arguments, "--profile", "2:5"])
    assert second.code == 0
    assert traced(profiled)[1:] == [list(range(left + 1, 6))]
    assert_same(profiled, plain, same_saves=False)


@pytest.mark.slow
def test_a_run_that_stops_early_writes_what_it_has(project, call, tmp_path):
    ended = call([*project.arguments(tmp_path / "run", **STOPS_EARLY), "--profile", "5:60"])
    assert ended.code == 0
    last = stopped_at(tmp_path / "run")
    assert 5 < last < 60
    assert traced(tmp_path / "run") == [list(range(5, last + 1))]
    assert f"profile of steps 5 to {last}: " in ended.out

    never = call([*project.arguments(tmp_path / "other", **STOPS_EARLY), "--profile", "60:60"])
    assert never.code == 0
    assert traced(tmp_path / "other") == []
    assert "not profiled: the run did not come to step 60" in never.out


@pytest.mark.parametrize("fails", ["start_trace", "stop_trace"])
def test_a_profile_that_cannot_be_made_costs_the_run_nothing(project, call, tmp_path, monkeypatch, fails):
    original = getattr(jax.profiler, fails)

    def full(*arguments, **named):
        if fails == "stop_trace":
            original()  # or the profiler would go on into the next test
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jax.profiler, fails, full)
    ended = call([*project.arguments(tmp_path / "run"), "--profile", "2:3"])
    assert ended.code == 0
    assert "not profiled: [Errno 28] No space left on device" in ended.out
    assert stopped_at(tmp_path / "run") == 6
