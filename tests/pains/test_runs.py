"""Pains of a run's life: when it stops, what it keeps, what it does with numbers that are none, on a full disk."""

import json
import math
import random
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora.data.batches import Batches
from jaxlora.runs.checkpoints import Checkpoints
from jaxlora.training.events import Standing, StepInfo
from jaxlora.training.stopping import EarlyStop, Evaluate, Ranked

WEIGHTS = "adapter_model.safetensors"

# ---- early stopping -----------------------------------------------------------------------------------------------


def stops_at(values, patience, min_delta=0.0, min_steps=0, resumed=()):
    """Feeds eval/nll at steps 0, 10, ...; the step of the stop, or None. Before the evaluations named in `resumed` the
    run is killed, and goes on from what a checkpoint holds."""
    standing, by = Standing(), Ranked("eval/nll", lambda new, old: new < old)
    for index, nll in enumerate(values):
        if index in resumed:
            standing = Standing.from_json(json.loads(json.dumps(standing.to_json())))
        standing.last = {"step": index * 10, "eval/nll": nll}
        stop = EarlyStop(standing, by, patience, min_delta, False, min_steps, None, no_recall, said.append)
        if stop(StepInfo(index * 10, 10**6, {})):
            return index * 10
    return None


said: list[str] = []


def no_recall(step, name):
    return None


def test_early_stopping_fires_although_the_loss_falls_steadily():
    """improvements add up: the reference is the value at the last counted improvement; never before
    `stop.min_steps`; counters survive a resume
    """
    falling = [2.0 - 0.004 * i for i in range(100)]
    assert stops_at(falling, patience=3, min_delta=0.01) is None
    assert stops_at([2.0, 1.996, 1.992, 1.991], patience=3, min_delta=0.01) == 30  # and this is no progress
    assert stops_at([2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6], patience=2) == 20
    assert stops_at([2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6], patience=2, min_steps=30) == 40
    chance = random.Random(0)
    stopped = 0
    for _ in range(50):
        values = [2.0 - 0.01 * i + 0.03 * chance.random() for i in range(30)]
        expected = stops_at(values, patience=3, min_delta=0.02, min_steps=40)
        assert stops_at(values, 3, 0.02, 40, resumed=chance.sample(range(1, 30), 5)) == expected
        assert expected is None or expected >= 40
        stopped += expected is not None
    assert 0 < stopped < 50


# ---- the best checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_best_checkpoint_is_gone_or_overwritten_after_a_resume(fine_tune, lines, tmp_path, monkeypatch):
    """the adapter is saved as best at the very eval that found it; kill and resume at any step leaves best and curve
    bit-identical
    """
    settings = {
        "train__max_steps": 5, "eval__every": 1, "checkpoint__every": 2, "checkpoint__keep": 1,
        "optim__learning_rate": 0.2, "optim__warmup_steps": 0, "seed": 1,
    }  # fmt: skip
    undisturbed, found = tmp_path / "undisturbed", []
    batch, save, evaluate = Batches.batch, Checkpoints.save, Evaluate.__call__

    def kept(event: Evaluate, info: StepInfo) -> None:
        evaluate(event, info)
        if event.due(info) and event.standing.best["step"] == info.step:
            state = jax.device_get(info.state)
            saved = load_file(undisturbed / "best" / WEIGHTS)
            q = state.adapter["layers"]["self_attn"]["q_proj"]["b"]  # type: ignore[union-attr]
            name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
            np.testing.assert_array_equal(saved[name], q[0].T)
            found.append(info.step)

    def killed(batches: Batches, step: int, *rows):
        """What is on disk now is what a kill would leave; saves in progress are tests/train/test_resume.py's affair."""
        if undisturbed.exists():
            shutil.copytree(undisturbed, tmp_path / f"killed before batch {step}")
        return batch(batches, step, *rows)

    def save_and_wait(checkpoints: Checkpoints, *arguments):
        save(checkpoints, *arguments)
        checkpoints.wait()

    with monkeypatch.context() as patch:
        patch.setattr(Evaluate, "__call__", kept)
        patch.setattr(Batches, "batch", killed)
        patch.setattr(Checkpoints, "save", save_and_wait)
        fine_tune(undisturbed, **settings)
    evals = {line["step"]: line["eval/nll"] for line in lines(undisturbed) if "eval/nll" in line}
    best = min(evals, key=lambda step: evals[step])
    assert 0 < best < 4, evals  # a run that got worse, for long enough to be saved and resumed meanwhile
    assert found[-1] == best
    for step in range(2, 6):
        resumed = tmp_path / f"killed before batch {step}"
        said = fine_tune(resumed, **settings)
        assert ("going on after step" in said) == (step > 2)
        assert contents(resumed) == contents(undisturbed)


def contents(workdir: Path) -> dict[str, bytes]:
    """Both adapters, the curves and the record, but for the time that it took."""
    files = [*workdir.glob("best/*"), *workdir.glob("last/*"), *workdir.glob("eval/*")]
    found = {str(file.relative_to(workdir)): file.read_bytes() for file in files}
    curves = (workdir / "metrics.jsonl").read_bytes()
    found["curves"] = re.sub(rb', "train/tokens_per_second": [\d.]+', b"", curves)
    found["record"] = json.dumps({**json.loads((workdir / "record.json").read_text()), "seconds": 0}).encode()
    return found


# ---- numbers that are none ----------------------------------------------------------------------------------------


def test_nan_is_shown_as_loss_0_0(make_tiny, train_step):
    """a non-finite loss or gradient never touches the parameters, is logged as such with the ids of the rows in the
    batch, and ends the run or rolls it back as configured
    """
    tiny = make_tiny()
    norm = {"scale": tiny.base["norm"]["scale"].at[3].set(jnp.nan)}
    state, batch = tiny.state._replace(step=jnp.asarray(5)), tiny.batch(0, 8, 16, 1)
    after, sums = train_step(state, {**tiny.base, "norm": norm}, batch)
    assert math.isnan(float(sums.objective))
    assert float(sums.applied) == 0.0
    for new, old in ((after.adapter, state.adapter), (after.moments, state.moments)):
        jax.tree.map(np.testing.assert_array_equal, new, old)
    # The same step with the base as it should be does move them.
    moved, sums = train_step(state, tiny.base, batch)
    assert float(sums.applied) == 1.0
    assert any(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), moved.adapter, state.adapter)))


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_nan_is_shown_as_loss_0_0_and_the_run_goes_on_to_its_end(policy, fine_tune, lines, tmp_path):
    """a non-finite loss or gradient never touches the parameters, is logged as such with the ids of the rows in the
    batch, and ends the run or rolls it back as configured
    """
    workdir = tmp_path / "run"
    said = fine_tune(workdir, optim__learning_rate=1e30, guard__on_nonfinite=policy, train__max_steps=4)
    record, curve = json.loads((workdir / "record.json").read_text()), lines(workdir)
    broken = [line for line in curve if "train/nonfinite" in line]
    if policy == "stop":
        assert record["status"] == "diverged"
        assert len(broken) == 1
        assert curve[-1]["step"] == broken[0]["step"]
    else:
        assert record["status"] == "finished"
        assert record["skipped_updates"] == len(broken) >= 2
    for line in broken:
        assert re.match(r".*train\.jsonl, row \d+; .*row \d+", line["train/rows"])
        assert f"step {line['step']}: the " in said
        assert line["train/rows"] in said
        (logged,) = (other for other in curve if other["step"] == line["step"] and "train/grad_norm" in other)
        assert None in (logged["train/loss"], logged["train/grad_norm"])
        assert logged["train/loss"] != 0.0
        assert {"train/loss/nonfinite", "train/grad_norm/nonfinite"} & logged.keys()
    for folder in ("best", "last"):
        assert all(np.isfinite(tensor).all() for tensor in load_file(workdir / folder / WEIGHTS).values())


# ---- the disk -----------------------------------------------------------------------------------------------------


def test_saving_stops_the_run_for_seconds(tmp_path):
    """saves are asynchronous and atomic; a failed save is reported, the last good one stays, the run goes on"""
    state = {"w": jax.random.normal(jax.random.key(0), (40_000_000,))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        # 160 MB are under way, and not in their place before they are complete.
        assert not (tmp_path / "1").exists()
        assert checkpoints.problems() == []
        checkpoints.wait()
        assert (tmp_path / "1").exists()
        assert checkpoints.steps() == [1]


def test_saving_stops_the_run_a_full_disk_kills_it_and_spoils_the_last_good_checkpoint(
    fine_tune, full_disk, tmp_path, monkeypatch
):
    """saves are asynchronous and atomic; a failed save is reported, the last good one stays, the run goes on"""
    workdir, save = tmp_path / "run", Checkpoints.save
    intact = {}

    def save_on_a_full_disk(checkpoints: Checkpoints, step: int, state, *rest) -> None:
        if step != 4:
            return save(checkpoints, step, state, *rest)
        checkpoints.wait()
        with full_disk(1000):
            save(checkpoints, step, state, *rest)
            checkpoints.wait()
        with Checkpoints(checkpoints.folder) as other:
            restored = other.restore(state)
        intact[4] = restored and restored.step
        return None

    monkeypatch.setattr(Checkpoints, "save", save_on_a_full_disk)
    settings = {"train__max_steps": 6, "checkpoint__every": 2, "eval__every": 100}
    said = fine_tune(workdir, **settings)
    assert "the checkpoint of step 4 could not be saved" in said
    assert "File too large" in said
    assert intact == {4: 2}
    assert json.loads((workdir / "record.json").read_text())["status"] == "finished"
    assert sorted(entry.name for entry in (workdir / "checkpoints").iterdir()) == ["2", "6"]
