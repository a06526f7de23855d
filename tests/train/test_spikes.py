"""Whole runs that meet a poisoned batch or far too high a rate: found at its step, rows named, dealt with as told."""

import contextlib
import io
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora import train
from jaxlora.data.batches import Batches
from jaxlora.runs import writers
from jaxlora.runs.checkpoints import Checkpoints
from jaxlora.runs.directory import RunDirectory
from tests.train.conftest import SETTINGS, Project, talk, write_config, write_rows

POISONED = 10
"""The step whose batch is absurd: batches of 8 rows, one example each, in the order of the file."""

ROWS = range(8 * (POISONED - 1) + 1, 8 * POISONED + 1)
"""Its rows in the file, from 1."""

Train = Callable[..., str]


@pytest.fixture(scope="module")
def project(repository, tmp_path_factory) -> Project:
    """A trained base, unlike the other tests' random one: it is certain of something, so it can be badly wrong."""
    folder = tmp_path_factory.mktemp("spikes")
    assets = repository / "configs/quickstart_assets"
    pig_latin = [json.loads(line) for line in (assets / "train.jsonl").read_text().splitlines()]
    rows = [{"messages": row["messages"][-2:]} for row in pig_latin[:260]]
    write_rows(folder / "eval.jsonl", rows[240:])
    write_rows(folder / "sane.jsonl", rows[:240])
    chance = random.Random(0)
    for row in ROWS:
        absurd = "".join(chance.choice("~^`|{}<>=+#%&QXZ0123") for _ in range(20 + row % 8))
        rows[row - 1] = talk("zz", absurd)
    write_rows(folder / "train.jsonl", rows[:240])
    named = {"model.path": str(assets / "base"), "data.eval": str(folder / "eval.jsonl")}
    named["data.train"] = str(folder / "train.jsonl")
    settings = SETTINGS | {
        "data.max_length": 64, "data.packing": False, "data.shuffle": False, "lora.alpha": 64.0,
        "optim.learning_rate": 1e-3, "train.max_steps": 14, "eval.every": 4, "checkpoint.every": 4, "guard.window": 8,
    }  # fmt: skip
    return Project(folder, assets / "base", write_config(folder / "tiny.py", **named, **settings))


@pytest.fixture(scope="module")
def command(project) -> Train:
    """command(workdir, **changed) -> what the command prints; on one device, and without TensorBoard's import."""
    one = jax.devices()[:1]

    def run(workdir: Path, **changed: Any) -> str:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setattr(jax, "devices", lambda *_: one)
            patch.setattr(writers, "_open", lambda *_: writers._Nowhere())
            assert train.main(project.arguments(workdir, **changed)) == 0
        return out.getvalue()

    return run


@pytest.fixture(scope="module")
def fitted(command, project, tmp_path_factory) -> str:
    """An adapter that does its task, to start from."""
    workdir = tmp_path_factory.mktemp("fitted") / "run"
    sane = project.folder / "sane.jsonl"
    command(workdir, data__train=sane, optim__learning_rate=1e-2, train__max_steps=24, eval__every=24)
    assert not (workdir / "spikes").exists()  # and its training, from a loss of 5 down, is no alarm
    assert record(workdir)["best"]["eval/nll"] < 1.5
    return str(workdir / "best")


@pytest.fixture(scope="module")
def undisturbed(command, fitted, tmp_path_factory) -> Path:
    """A run that rolls back from the poisoned batch."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    said = command(workdir, lora__init_from=fitted, **ROLLBACK)
    (workdir / "said.txt").write_text(said)
    return workdir


ROLLBACK = {"guard__on_spike": "rollback", "guard__on_nonfinite": "rollback"}


def lines(workdir: Path, name: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if name in line]


def record(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "record.json").read_text())


def spikes(workdir: Path) -> list[int]:
    return sorted(int(file.stem.split("-")[1]) for file in (workdir / "spikes").iterdir())


def check_adapter(workdir: Path) -> None:
    """best/ is what the evaluation of its step scored: finite, and better than or equal to the first."""
    best, evals = record(workdir)["best"], lines(workdir, "eval/nll")
    assert best["eval/nll"] == min(line["eval/nll"] for line in evals if line["eval/nll"] is not None)
    assert [line["eval/nll"] for line in evals if line["step"] == best["step"]] == [best["eval/nll"]]
    tensors = load_file(workdir / "best/adapter_model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


def contents(workdir: Path) -> dict[str, bytes]:
    """What a run leaves, but for the time that it took."""
    files = [file for folder in ("best", "last", "eval", "spikes") for file in workdir.glob(f"{folder}/*")]
    found = {str(file.relative_to(workdir)): file.read_bytes() for file in files}
    curves = (workdir / "metrics.jsonl").read_bytes()
    found["curves"] = re.sub(rb', "train/tokens_per_second": [\d.]+', b"", curves)
    found["record"] = json.dumps({**record(workdir), "seconds": 0}).encode()
    return found


def assert_same(workdir: Path, undisturbed: Path) -> None:
    found, expected = contents(workdir), contents(undisturbed)
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name] == expected[name], name


# ---- a poisoned batch ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["log", "skip", "stop"])
def test_a_poisoned_batch_is_found_named_and_dealt_with(policy, command, fitted, project, tmp_path):
    harsh = {} if policy != "skip" else {"guard__on_nonfinite": "skip"}
    said = command(tmp_path / "run", lora__init_from=fitted, guard__on_spike=policy, **harsh)
    workdir = tmp_path / "run"
    (line,) = lines(workdir, "train/spike")
    assert line["step"] == POISONED
    assert line["train/spike"] > 6
    assert f"step {POISONED}: a spike: " in said
    assert line["train/rows"] in said
    applied = "applied" if policy == "log" else "not applied"
    assert f"The update was {applied} (guard.on_spike = {policy})" in said

    assert spikes(workdir) == [POISONED]
    file = workdir / f"spikes/spike-{POISONED:08d}.jsonl"
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    source = [json.loads(text) for text in (project.folder / "train.jsonl").read_text().splitlines()]
    assert sorted(row["row"] for row in rows) == list(ROWS)
    assert [row["nll"] for row in rows] == sorted((row["nll"] for row in rows), reverse=True)
    for row in rows:
        assert row["source"] == str(project.folder / "train.jsonl")
        assert row["conversation"] == source[row["row"] - 1]["messages"]
        assert row["batch_row"] == row["row"] - ROWS[0]
    assert line["train/rows"].startswith(f"{rows[0]['source']}, row {rows[0]['row']}; ")

    told = record(workdir)
    assert (told["spikes"], told["skipped_updates"]) == (1, policy != "log")
    assert told["status"] == ("diverged" if policy == "stop" else "finished")
    check_adapter(workdir)


@pytest.mark.slow
def test_the_run_goes_back_from_a_poisoned_batch(undisturbed, tmp_path):
    said, told = (undisturbed / "said.txt").read_text(), record(undisturbed)
    assert told["status"] == "finished"
    assert told["rollbacks"] == [{"step": POISONED, "to": 8, "learning_rate": 5e-4}]
    assert f"a spike at step {POISONED}: " in said
    assert (
        f"going back to step 8, and on with a learning rate of 0.0005 and without the batch of step {POISONED}"
        in said
    )
    # Every step stands there once; the one whose batch is left out has no loss, and the rate is halved from there on.
    steps = {line["step"]: line["train/learning_rate"] for line in lines(undisturbed, "train/nll")}
    assert list(steps) == [n for n in range(1, 15) if n != POISONED]
    assert len(lines(undisturbed, "train/nll")) == len(steps)
    schedule = [0.5 * (1 + np.cos(np.pi * (step - 1 - 2) / 12)) for step in steps if step > 3]
    rates = [rate / (1e-3 if step <= 8 else 5e-4) for step, rate in steps.items() if step > 3]
    np.testing.assert_allclose(rates, schedule, rtol=1e-5, atol=1e-6)
    assert [line["step"] for line in lines(undisturbed, "train/rollback")] == [9]
    assert lines(undisturbed, "train/spike") == []  # the branch of the run that is no more
    assert spikes(undisturbed) == [POISONED]  # but its rows are there to be looked at
    assert [line["step"] for line in lines(undisturbed, "eval/nll")] == [0, 4, 8, 12, 14]
    check_adapter(undisturbed)


@pytest.mark.slow
def test_killed_around_a_rollback_it_ends_the_same(command, fitted, undisturbed, tmp_path, monkeypatch):
    """What is on disk before a batch is made, and in the middle of the rollback, is what a kill would leave."""
    workdir, batch, truncate = tmp_path / "run", Batches.batch, RunDirectory.truncate
    calls, copies = itertools.count(1), []

    def copy(name: str) -> None:
        copies.append(tmp_path / name)
        shutil.copytree(workdir, copies[-1])

    def counted(batches: Batches, step: int, *rows):
        # Batch 12 is the last before the verdict on step 10 comes; then 9 is made again, and so on.
        if (call := next(calls)) in (12, 13, 15, 17):
            copy(f"before batch {step}, call {call}")
        return batch(batches, step, *rows)

    def truncated(run: RunDirectory, *arguments):
        copy("in the rollback, before the curves are cut")
        truncate(run, *arguments)
        copy("in the rollback, after the curves are cut")

    def save_and_wait(checkpoints: Checkpoints, *arguments):
        save(checkpoints, *arguments)
        checkpoints.wait()

    save = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "batch", counted)
        patch.setattr(RunDirectory, "truncate", truncated)
        patch.setattr(Checkpoints, "save", save_and_wait)
        command(workdir, lora__init_from=fitted, **ROLLBACK)
    assert len(copies) == 6
    expected = contents(undisturbed)
    assert contents(workdir) == expected
    for killed in copies:
        assert "going on after step" in command(killed, lora__init_from=fitted, **ROLLBACK)
        assert_same(killed, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("leaves", [9, 10, 13])
def test_asked_to_leave_around_a_rollback_it_ends_the_same(
    leaves, command, fitted, undisturbed, tmp_path, monkeypatch
):
    """A checkpoint that is there because someone asked, of step 9, is no place to go back to."""

    @contextlib.contextmanager
    def asked(*_):
        yield lambda step: step >= leaves

    with monkeypatch.context() as patch:
        patch.setattr(train, "_leaving_on_request", asked)
        command(tmp_path / "run", lora__init_from=fitted, **ROLLBACK)
    assert record(tmp_path / "run")["status"] == "preempted"
    assert "going on after step" in command(tmp_path / "run", lora__init_from=fitted, **ROLLBACK)
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_spike_right_after_going_back_goes_back_further(command, fitted, project, tmp_path):
    """Step 9 is poisoned too: from there back to 8; 10 is then the next step, so 8 was not good enough: back to 4."""
    rows = (project.folder / "train.jsonl").read_text().splitlines(keepends=True)
    rows[ROWS[0] - 9 : ROWS[0] - 1] = rows[ROWS[0] - 1 : ROWS[-1]]
    (tmp_path / "both.jsonl").write_text("".join(rows))
    workdir = tmp_path / "run"
    command(workdir, lora__init_from=fitted, data__train=tmp_path / "both.jsonl", **ROLLBACK)
    told = record(workdir)
    assert told["status"] == "finished"
    assert told["rollbacks"] == [
        {"step": 9, "to": 8, "learning_rate": 5e-4},
        {"step": 10, "to": 4, "learning_rate": 2.5e-4},
    ]
    steps = [line["step"] for line in lines(workdir, "train/nll")]
    assert steps == [n for n in range(1, 15) if n not in (9, 10)]
    rates = {line["step"]: line["train/learning_rate"] for line in lines(workdir, "train/nll")}
    assert rates[5] / rates[4] < 0.25
    check_adapter(workdir)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_no_place_to_go_back_to(command, fitted, tmp_path, monkeypatch):
    """The one before it is, which is said, and in its place the next save finds room."""
    workdir, batch, save, calls = tmp_path / "run", Batches.batch, Checkpoints.save, itertools.count(1)

    def damaging(batches: Batches, step: int, *rows):
        if next(calls) == 12:  # the last one before the verdict on step 10 comes
            for file in (workdir / "checkpoints/8/state").rglob("*"):
                if file.is_file():
                    os.truncate(file, file.stat().st_size // 2)
        return batch(batches, step, *rows)

    def save_and_wait(checkpoints: Checkpoints, *arguments):
        save(checkpoints, *arguments)
        checkpoints.wait()

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "batch", damaging)
        patch.setattr(Checkpoints, "save", save_and_wait)
        said = command(workdir, lora__init_from=fitted, **ROLLBACK)
    assert f"{workdir / 'checkpoints/8'} is damaged" in said
    told = record(workdir)
    assert told["status"] == "finished"
    assert told["rollbacks"] == [{"step": POISONED, "to": 4, "learning_rate": 5e-4}]
    assert sorted(entry.name for entry in (workdir / "checkpoints").iterdir()) == ["12", "14", "8"]
    check_adapter(workdir)


# ---- a learning rate of 1 -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "skip", "log", "rollback"])
def test_a_learning_rate_of_1_ends_as_diverged_with_its_best_adapter(
    policy, command, fitted, project, tmp_path
):
    """The rate is 0 at step 1 and a half at step 2: step 3 is the first to have a loss that shows it."""
    workdir, sane = tmp_path / "run", project.folder / "sane.jsonl"
    changed = {"guard__on_nonfinite": policy} if policy != "log" else {}
    changed |= {"guard__max_skipped": 1} if policy == "skip" else {}
    said = command(
        workdir,
        lora__init_from=fitted,
        optim__learning_rate=1.0,
        data__train=sane,
        guard__on_spike=policy,
        **changed,
    )
    told = record(workdir)
    assert told["status"] == "diverged"
    assert spikes(workdir)[0] == 3
    assert "a spike" in said
    if policy == "log":
        assert "the median nll of the last 8 steps is" in told["reason"]
    if policy == "skip":
        assert "2 updates were skipped (guard.max_skipped = 1)" in told["reason"]
    if policy == "stop":
        assert told["reason"].startswith("a spike at step 3: ")
    if policy == "rollback":
        assert [back["learning_rate"] for back in told["rollbacks"]] == [0.5, 0.25, 0.125]
        assert told["rollbacks"][0] == {"step": 3, "to": 0, "learning_rate": 0.5}
        assert "after 3 rollbacks (guard.max_rollbacks)" in told["reason"]
    check_adapter(workdir)
