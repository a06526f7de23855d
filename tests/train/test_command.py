"""The train command from its arguments to the folder it leaves, on a model of a few thousand parameters."""

import contextlib
import io
import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlora import train
from jaxlora.config.schema import KEYS
from jaxlora.core import cli
from jaxlora.core.tree import leaves
from jaxlora.training.metrics import METRICS
from tests.train.commands import assert_same

COMPILED = "/jax/core/compile/backend_compile_duration"
ASKED, HIT = "/jax/compilation_cache/compile_requests_use_cache", "/jax/compilation_cache/cache_hits"


class Finished(NamedTuple):
    """A run that went through: its folder, its output, the command's arguments."""

    workdir: Path
    out: str
    arguments: list[str]


@pytest.fixture(scope="module")
def finished(project, tmp_path_factory) -> Finished:
    """Six steps on one device, in a folder named by the time."""
    one, arguments = jax.devices()[:1], ["--config", str(project.config)]
    here = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(jax, "devices", lambda *_: one)
        patch.setattr(sys, "argv", ["jaxlora.train", *arguments])
        patch.chdir(here)
        with pytest.raises(SystemExit) as left:
            cli.run(train.main)
    assert left.value.code == 0
    (workdir,) = (here / "runs").iterdir()
    return Finished(workdir, out.getvalue(), arguments)


def lines(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def curve(workdir: Path, name: str) -> dict[int, Any]:
    """One quantity of metrics.jsonl by step."""
    return {line["step"]: line[name] for line in lines(workdir) if name in line}


def record(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "record.json").read_text())


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, with keys joined by dots."""
    return {".".join(path): value for path, value in leaves(tree)}


# ---- what a run leaves --------------------------------------------------------------------------------------------


def test_folder(finished):
    names = {entry.name for entry in finished.workdir.iterdir() if not entry.name.startswith(".")}
    assert names == {
        "config.json", "record.json", "metrics.jsonl", "eval", "tensorboard", "checkpoints", "best", "last",
    }  # fmt: skip
    assert re.fullmatch(r"[A-Z][a-z]{2}\d\d_\d\d-\d\d-\d\d_tiny", finished.workdir.name)
    assert {entry.name for entry in (finished.workdir / "checkpoints").iterdir()} == {"3", "6"}
    for name in ("best", "last"):
        files = {entry.name for entry in (finished.workdir / name).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}


def test_config(finished, project):
    config = flat(json.loads((finished.workdir / "config.json").read_text()))
    assert config.keys() == KEYS.keys()
    assert config["model.path"] == str(project.model)
    assert config["optim.b2"] == 0.999


def test_record(finished):
    found = record(finished.workdir)
    evals, trained = curve(finished.workdir, "eval/nll"), curve(finished.workdir, "train/tokens")
    assert found["status"] == "finished"
    assert found["reason"] == "all 6 steps done"
    assert found["steps"] == 6
    assert found["best"] == {"step": 6, "eval/nll": min(evals.values())}
    assert found["first"] == {"step": 0, "eval/nll": evals[0]}
    assert found["last"] == {"step": 6, "eval/nll": evals[6]}
    assert found["tokens"] == sum(trained.values())
    assert found["seconds"] > 0
    assert found["versions"]["jax"] == jax.__version__
    assert found["devices"] == "1 x cpu"
    assert found["data"]["train"]["examples"] == 60
    assert found["data"]["eval"]["examples"] == 20
    assert len(found["data"]["train"]["fingerprint"]) == 32
    assert found["baseline"] == found["hypothesis"] == ""
    assert found["total_steps"] == 6
    assert {"model.path", "train.max_steps"} < set(found["not_default"])
    assert "optim.eps" not in found["not_default"]


def test_curves(finished):
    found = lines(finished.workdir)
    trained = [line for line in found if "train/nll" in line]
    evaluated = [line for line in found if "eval/nll" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in evaluated] == [0, 3, 6]
    for line in trained:
        assert line.keys() == {
            "step", "train/loss", "train/nll", "train/token_accuracy", "train/grad_norm", "train/learning_rate",
            "train/tokens", "train/tokens_per_second",
        }  # fmt: skip
    for line in evaluated:
        assert line.keys() == {
            "step",
            "train_eval/nll",
            "train_eval/overfit",
            *(f"eval/{name}" for name in METRICS),
        }  # one turn, one source
        assert line["eval/perplexity"] == pytest.approx(math.exp(line["eval/nll"]))
    # Warmup over 2 steps, then half a cosine over the 4 that are left.
    rates = [0, 0.5, *(0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4))]
    assert [line["train/learning_rate"] for line in trained] == pytest.approx([0.01 * rate for rate in rates])
    assert evaluated[-1]["eval/nll"] < evaluated[0]["eval/nll"] - 0.5


def test_losses_of_examples(finished):
    for step, nll in curve(finished.workdir, "eval/nll").items():
        rows = [
            json.loads(row)
            for row in (finished.workdir / f"eval/eval-{step:08d}.jsonl").read_text().splitlines()
        ]
        assert [row["example"] for row in rows] == list(range(20))
        total = sum(row["nll"] * row["tokens"] for row in rows)
        assert total / sum(row["tokens"] for row in rows) == pytest.approx(nll, rel=1e-12)


def test_texts_of_examples(finished, project):
    """So that runs are compared by example, years later, without the data."""
    kept = [
        json.loads(row)
        for row in (finished.workdir / "eval/examples-00000000.jsonl").read_text().splitlines()
    ]
    data = [json.loads(row)["messages"] for row in (project.folder / "eval.jsonl").read_text().splitlines()]
    assert [row["example"] for row in kept] == [row["row"] for row in kept] == list(range(20))
    assert [row["prompt"] for row in kept] == [messages[-2]["content"] for messages in data]
    assert [row["reference"] for row in kept] == [messages[-1]["content"] for messages in data]


def test_tensorboard(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.workdir / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    names = {name for line in lines(finished.workdir) for name in line} - {"step"}
    assert names <= {*tags["tensors"], *tags["scalars"]}
    assert any("hparams" in plugin for plugin in events.summary_metadata)


def test_output(finished, project):
    """A summary before and after, and the commands to type next."""
    workdir = finished.workdir.relative_to(finished.workdir.parents[1])
    again = f"python -m jaxlora.train --config {project.config} --workdir {workdir}"
    before, after = finished.out.split("what came of it")
    for words in (
        f"run folder     {workdir}", f"model          {project.model} (qwen2, ", "float32)", "rank 4 on ",
        "4,096 trainable parameters (15.08%)", "1 x cpu (mesh: data 1, fsdp 1, tensor 1)",
        "60 examples in 30 rows of 48", "20 held out", "4 an epoch", "2 steps of warmup (33% of the run)",
        "shrinks a weight by 0.03%", again, "train.jsonl: 60 rows of messages", "step 6/6  loss ", "tokens/s",
    ):  # fmt: skip
        assert words in before
    evals = curve(finished.workdir, "eval/nll")
    for words in (
        f"eval nll before   {evals[0]:.4f}", f"eval nll at best  {evals[6]:.4f} (step 6)", f"{workdir}/best",
        f"python -m jaxlora.generate --run {workdir}",
    ):  # fmt: skip
        assert words in after
    assert "\x1b" not in finished.out


def test_the_printed_command_can_be_typed(project, call, tmp_path):
    """Flags keep their quotes: a shell reads back what was typed."""
    arguments = project.arguments(tmp_path / "a run", train__max_steps=1, optim__warmup_steps=0,
                                  lora__targets="('q_proj', 'v_proj')")  # fmt: skip
    ended = call(arguments)
    assert ended.code == 0, ended.err
    (line,) = (line for line in ended.out.splitlines() if line.startswith("  to go on"))
    typed = line.split("to go on", 1)[1].strip().removesuffix(" (should it be interrupted)")
    assert shlex.split(typed) == ["python", "-m", "jaxlora.train", *arguments]


def test_help(call):
    ended = call(["--help"])
    assert ended.code == 0
    assert "--workdir" in ended.out
    assert [key for key in KEYS if key not in ended.out] == []


# ---- compilation --------------------------------------------------------------------------------------------------


def test_steps_compile_once_and_the_cache_survives(finished, project, call, tmp_path, counted):
    """As much is compiled for 12 steps as for 6, and what takes long was found in the user's cache."""
    counts = []
    for steps in (6, 12):
        counted.clear()
        assert call(project.arguments(tmp_path / str(steps), train__max_steps=steps, eval__every=3)).code == 0
        counts.append(counted[COMPILED])
        assert counted["step"] == counted["evaluate"] == 1, counted
        # What takes less than half a second to compile is not kept.
        assert counted[HIT] >= 2, counted
        assert counted[ASKED] >= counted[HIT]
    assert counts[0] == counts[1] > 0


# ---- what must not matter -----------------------------------------------------------------------------------------


def assert_same_curves(workdir: Path, other: Path, rel: float) -> None:
    for name in ("train/loss", "train/nll", "train/grad_norm", "eval/nll", "eval/token_accuracy"):
        assert curve(workdir, name) == pytest.approx(curve(other, name), rel=rel), name


def test_micro_batches(finished, project, call, tmp_path, told):
    """8 micro-batches of one row are one of 8."""
    assert call(project.arguments(tmp_path / "run", train__micro_batch_size=1)).code == 0
    (most,) = told
    assert most > 1, "attention knows that rows are packed"
    assert_same_curves(tmp_path / "run", finished.workdir, 1e-5)


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor"),
    [pytest.param(8, 1, 1, marks=pytest.mark.slow), pytest.param(1, 8, 1, marks=pytest.mark.slow), (2, 2, 2)],
)
def test_meshes(finished, project, call, tmp_path, devices, data, fsdp, tensor):
    devices(8)
    mesh = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
    assert call(project.arguments(tmp_path / "run", **mesh)).code == 0
    assert record(tmp_path / "run")["devices"] == "8 x cpu"
    assert_same_curves(tmp_path / "run", finished.workdir, 1e-5)


def test_packing_off(finished, project, call, tmp_path, told):
    """More rows, the same examples: the base's loss is the same."""
    ended = call(project.arguments(tmp_path / "run", data__packing=False))
    assert ended.code == 0
    assert "60 examples in 60 rows" in ended.out
    assert told == [1], "attention knows that a row has one example"
    evals = [curve(workdir, "eval/nll") for workdir in (tmp_path / "run", finished.workdir)]
    assert evals[0][0] == pytest.approx(evals[1][0], rel=1e-5)
    assert evals[0][6] != evals[1][6]


def test_label_smoothing(finished, project, call, tmp_path):
    """The objective is another, the losses that are compared are the same until it has moved the adapter."""
    smoothed, plain = tmp_path / "run", finished.workdir
    assert call(project.arguments(smoothed, optim__label_smoothing=0.1)).code == 0
    assert curve(smoothed, "eval/nll")[0] == pytest.approx(curve(plain, "eval/nll")[0], rel=1e-6)
    assert curve(smoothed, "train/nll")[1] == pytest.approx(curve(plain, "train/nll")[1], rel=1e-6)
    assert curve(smoothed, "train/loss")[1] != pytest.approx(curve(plain, "train/loss")[1], rel=1e-3)
    assert curve(smoothed, "eval/nll")[6] != curve(plain, "eval/nll")[6]


def test_init_from(finished, project, call, tmp_path):
    """A run that starts from an adapter starts from its loss."""
    init = finished.workdir / "best"
    assert call(project.arguments(tmp_path / "run", lora__init_from=init)).code == 0
    before = curve(finished.workdir, "eval/nll")
    after = curve(tmp_path / "run", "eval/nll")
    assert after[0] == before[6]
    assert after[6] < before[6]


# ---- numbers that are none ----------------------------------------------------------------------------------------


def adapter_is_finite(folder: Path) -> bool:
    return all(
        np.isfinite(tensor).all() for tensor in load_file(folder / "adapter_model.safetensors").values()
    )


def test_diverging(project, call, tmp_path):
    """A learning rate that blows the adapter up ends the run; the best adapter is the one from before."""
    workdir = tmp_path / "run"
    ended = call(project.arguments(workdir, optim__learning_rate=1e30, eval__every=2))
    assert ended.code == 0, ended.err
    assert record(workdir)["status"] == "diverged"
    assert record(workdir)["best"]["step"] == 0
    (step,) = curve(workdir, "train/nonfinite")
    assert step in (2, 3)
    assert f"step {step}: the " in ended.out
    rows = curve(workdir, "train/rows")[step]
    assert re.match(r".*train\.jsonl, row \d+; ", rows)
    assert rows in ended.out
    (line,) = (line for line in lines(workdir) if line["step"] == step and "train/nll" in line)
    assert None in line.values()
    assert adapter_is_finite(workdir / "best")
    assert adapter_is_finite(workdir / "last")

    again = call(project.arguments(workdir, optim__learning_rate=1e30, eval__every=2))
    assert again.code == 0
    assert "this run has ended (diverged: " in again.out


def test_skipping(project, call, tmp_path):
    """guard.on_nonfinite = skip leaves the updates out and goes on, until there were too many."""
    broken = {"optim__learning_rate": 1e30, "guard__on_nonfinite": "skip"}
    assert call(project.arguments(tmp_path / "run", **broken)).code == 0
    found = record(tmp_path / "run")
    assert found["status"] == "finished"
    assert found["skipped_updates"] == len(curve(tmp_path / "run", "train/nonfinite")) >= 3
    assert adapter_is_finite(tmp_path / "run/best")

    assert call(project.arguments(tmp_path / "other", **broken, guard__max_skipped=1)).code == 0
    assert record(tmp_path / "other")["status"] == "diverged"
    assert "guard.max_skipped = 1" in record(tmp_path / "other")["reason"]


def test_poisoned_base(project, call, tmp_path):
    """Nothing this base says is a number: the first step ends the run, and the folder says so in valid JSON."""
    model, workdir = Path(shutil.copytree(project.model, tmp_path / "model")), tmp_path / "run"
    tensors = load_file(model / "model.safetensors")
    poisoned = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors | {"model.norm.weight": poisoned}, model / "model.safetensors")
    ended = call(project.arguments(workdir, model__path=model))
    assert ended.code == 0, ended.err
    assert record(workdir)["status"] == "diverged"
    assert "step 1: the loss is not finite; the update was not applied" in ended.out
    assert "eval nll before   not finite" in ended.out
    assert "eval nll at best  none is finite" in ended.out
    assert record(workdir)["best"] is None
    assert not (workdir / "best").exists()
    assert curve(workdir, "eval/nll") == {0: None}
    assert list(curve(workdir, "train/nonfinite")) == [1]
    assert adapter_is_finite(workdir / "last")


# ---- by its folder alone --------------------------------------------------------------------------------------------


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the run's folder, which a command may lock and change."""
    return Path(shutil.copytree(finished.workdir, tmp_path / "copied"))


def test_a_run_goes_on_by_its_folder_alone(call, copied, finished):
    """As if it had been asked to leave at its first checkpoint, but for what it wrote later."""
    shutil.rmtree(copied / "checkpoints/6")
    (copied / "record.json").write_text(json.dumps(record(copied) | {"status": "preempted", "steps": 3}))
    ended = call(["--workdir", str(copied)])
    assert ended.code == 0, ended.err
    assert "going on after step 3" in ended.out
    assert f"python -m jaxlora.train --workdir {copied} (should it be interrupted)" in ended.out
    assert_same(copied, finished.workdir)


def test_an_ended_run_says_so_by_its_folder_alone(call, copied):
    ended = call(["--workdir", str(copied)])
    assert ended.code == 0
    assert "this run has ended (finished" in ended.out
    assert f"again             python -m jaxlora.train --workdir {copied}\n" in ended.out


def test_another_config_than_the_folders_is_refused(call, copied):
    ended = call(["--workdir", str(copied), "--config.lora.alpha=3"])
    assert ended.code == 2
    assert "holds a run with another config: lora.alpha is 8.0 there and 3.0 here" in ended.err


def test_a_folder_without_a_run_is_refused(call, tmp_path):
    ended = call(["--workdir", str(tmp_path / "nothing")])
    assert ended.code == 2
    assert "is not a run folder (it has no config.json)" in ended.err
    assert not (tmp_path / "nothing").exists()
