"""Runs made elsewhere: what they say is read, what they don't is marked, and nothing is guessed."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxlora.core.errors import InputError
from jaxlora.experiments.imports.board import read_board
from jaxlora.experiments.imports.events import event_files, read_events
from jaxlora.experiments.imports.find import read_all
from jaxlora.experiments.imports.schedule import recovered
from jaxlora.experiments.imports.table import read_tables
from jaxlora.experiments.imports.trainer import metric_name, read_trainer
from tests.experiments.folders import write_run

TRAINER = Path(__file__).parent / "trainer"
"""What transformers 5.24's Trainer left: 40 steps at 3e-2, 8 of them warmup, cosine, weight decay 0.1."""


def trainer(tmp_path: Path, *without: str) -> Path:
    folder = tmp_path / "Nov22_10-57"
    shutil.copytree(TRAINER, folder)
    for name in without:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    return folder


def state(folder: Path, **changes) -> None:
    file = folder / "checkpoint-40/trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---- the Trainer --------------------------------------------------------------------------------------------------


def test_a_trainers_folder_is_read_whole(tmp_path):
    run = read_trainer(trainer(tmp_path))
    assert (run.name, run.source, run.status, run.steps, run.planned_steps) == (
        "Nov22_10-57", "transformers", "finished", 40, 40,
    )  # fmt: skip
    wanted = {
        "model.path": "Qwen/Qwen2.5-0.5B-Instruct", "lora.rank": 8, "lora.alpha": 16,
        "lora.targets": ("q_proj", "v_proj"), "optim.learning_rate": 0.03, "optim.warmup_steps": 8,
        "optim.schedule": "cosine", "optim.weight_decay": 0.1, "optim.label_smoothing": 0.0,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "train.max_steps": 40,
    }  # fmt: skip
    assert {key: run.config.get(key) for key in wanted} == wanted
    steps, nll = run.train.of("train/nll")
    assert steps.tolist() == list(range(2, 41, 2))
    assert nll[0] == pytest.approx(1.0433, abs=1e-4)
    assert run.eval.of("eval/nll")[0].tolist() == [8, 16, 24, 32, 40]
    assert run.problems == ("not said: batch size",)  # how many devices there were
    assert "train.batch_size" not in run.config


def test_without_event_files_the_logged_rates_give_the_schedule_away(tmp_path):
    run = read_trainer(trainer(tmp_path, "runs"))
    assert (run.config["optim.learning_rate"], run.config["optim.warmup_steps"]) == (0.03, 8)
    assert any(
        "all 20 logged rates are those of 0.03, 8 warmup steps, cosine" in line for line in run.problems
    )
    assert "not said: batch size, weight decay, label smoothing" in run.problems
    assert "optim.weight_decay" not in run.config


def test_without_an_adapter_config_base_and_rank_are_marked(tmp_path):
    run = read_trainer(trainer(tmp_path, "adapter_config.json"))
    assert "lora.rank" not in run.config
    assert "not said: the base, rank, batch size" in run.problems


def test_the_newest_state_counts_and_a_broken_one_is_told(tmp_path):
    folder = trainer(tmp_path)
    shutil.copytree(folder / "checkpoint-40", folder / "checkpoint-50")
    (folder / "checkpoint-50/trainer_state.json").write_text('{"global_step": 50, ')
    run = read_trainer(folder)
    assert run.steps == 40
    assert any(
        line.startswith("checkpoint-50/trainer_state.json: is not valid JSON") for line in run.problems
    )


def test_a_state_that_cannot_be_read_leaves_the_curves_of_the_event_files(tmp_path):
    folder = trainer(tmp_path)
    (folder / "checkpoint-40/trainer_state.json").write_text("")
    run = read_trainer(folder)
    assert len(run.train.of("train/nll")[0]) == 20
    assert any("those of the event files" in line for line in run.problems)


def test_pickles_are_left_alone(tmp_path):
    folder = trainer(tmp_path)
    (folder / "training_args.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert read_trainer(folder).config == read_trainer(trainer(tmp_path / "other")).config


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"global_step": 24}, "stopped_early"),  # its TrainerControl says so
        (
            {"global_step": 24, "stateful_callbacks": {}, "log_history": []},
            "",
        ),  # killed, or going on: not known
    ],
)
def test_how_it_ended_is_told_only_where_the_state_says_so(tmp_path, changes, status):
    folder = trainer(tmp_path)
    state(folder, **changes)
    assert read_trainer(folder).status == status


def test_a_patience_is_a_setting(tmp_path):
    folder = trainer(tmp_path)
    state(folder, stateful_callbacks={"EarlyStoppingCallback": {"args": {"early_stopping_patience": 3}}})
    assert read_trainer(folder).config["stop.patience"] == 3


def test_a_loss_of_zero_with_no_norm_is_what_it_was(tmp_path):
    folder = trainer(tmp_path)
    state(
        folder,
        log_history=[
            {"step": 1, "loss": 2.0, "grad_norm": 1.0},
            {"step": 2, "loss": 0.0, "grad_norm": math.nan},
        ],
    )
    _, nll = read_trainer(folder).train.of("train/nll")
    assert nll.tolist() == [2.0, math.inf]


def test_a_smoothed_loss_is_no_nll(tmp_path, monkeypatch):
    from jaxlora.experiments.imports import trainer as module

    monkeypatch.setattr(module, "arguments", lambda _: {"optim.label_smoothing": 0.1})
    run = read_trainer(trainer(tmp_path))
    assert "eval/nll" not in run.eval.values
    assert len(run.eval.of("eval/loss")[0]) == 5
    assert any("smoothed by 0.1" in line for line in run.problems)


# ---- schedules ----------------------------------------------------------------------------------------------------


def rates(steps: np.ndarray, peak: float, warmup: int, total: int, kind: str) -> np.ndarray:
    """As transformers computes them, one at a time."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    found = []
    for _ in range(total + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return np.array(found)[steps]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize(("peak", "warmup"), [(2e-4, 100), (5e-5, 37), (1e-3, 15)])
def test_a_schedule_is_recovered_from_every_tenth_rate(kind, peak, warmup, shift):
    steps = np.arange(10, 501, 10)
    found = recovered(steps, rates(steps - shift, peak, warmup, 500, kind), 500)
    assert found is not None
    assert found.peak == pytest.approx(peak, rel=1e-3)
    assert found.warmup == warmup
    assert found.kind == kind.removesuffix("_with_warmup")


@pytest.mark.parametrize(
    ("first", "warmup", "kind"),
    [(200, 100, "linear"), (10, 5, "linear"), (10, 480, "linear")],
    ids=["no rate of the warmup", "the warmup ends before the first", "one rate after it"],
)
def test_rates_that_leave_a_choice_give_nothing(first, warmup, kind):
    steps = np.arange(first, 491, 10)
    assert recovered(steps, rates(steps, 2e-4, warmup, 500, kind), 500) is None


def test_rates_of_no_known_schedule_give_nothing():
    steps = np.arange(10, 501, 10)
    assert recovered(steps, 2e-4 * np.sin(np.pi * steps / 500) ** 2 + 1e-6, 500) is None


# ---- event files --------------------------------------------------------------------------------------------------


def write_events(folder: Path, points: dict[str, dict[int, float]], start_at: int | None = None) -> None:
    """As tensorboard's own writer does, which torch's uses; each call a second after the one before."""
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    before = event_files(folder)
    writer = EventFileWriter(str(folder))
    if start_at is not None:
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        writer.add_event(event_pb2.Event(step=start_at, session_log=start))
    for tag, values in points.items():
        for step, value in values.items():
            summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(event_pb2.Event(wall_time=1000.0 + step, step=step, summary=summary))
    writer.close()
    (new,) = set(event_files(folder)) - set(before)
    new.rename(folder / f"events.out.tfevents.{1000 + len(before)}.laptop.1.0")


def test_scalars_are_read_as_written(tmp_path):
    write_events(tmp_path, {"train/loss": {1: 2.0, 2: 1.5}, "eval/loss": {2: 1.75}, "lr": {1: 1e-4}})
    run = read_board(tmp_path)
    assert run.source == "tensorboard"
    assert run.train.of("train/nll")[1].tolist() == [2.0, 1.5]
    assert run.train.of("train/learning_rate")[1] == pytest.approx([1e-4])
    assert run.eval.of("eval/nll")[1].tolist() == [1.75]
    assert "not said: the base, rank, learning rate" in run.problems[-1]
    assert run.config == {"optim.largest_logged_learning_rate": pytest.approx(1e-4)}


def test_our_own_event_files_are_read(tmp_path):
    """clu writes tensors, TensorFlow's way."""
    from jaxlora.runs.directory import RunDirectory
    from jaxlora.runs.writers import Writers

    with RunDirectory.open(tmp_path / "run", {}) as run, Writers(run) as writers:
        for step in (1, 2, 3):
            writers.scalars(step, {"train/nll": 3.0 / step})
    found = read_events(event_files(tmp_path / "run/tensorboard"))
    assert list(found.scalars["train/nll"].values()) == pytest.approx([3.0, 1.5, 1.0])


def test_a_resumed_run_counts_its_repeated_steps_once(tmp_path):
    write_events(tmp_path, {"loss": {1: 3.0, 2: 2.0, 3: 9.0}})
    write_events(tmp_path, {"loss": {3: 1.0}}, start_at=3)
    assert read_events(event_files(tmp_path)).scalars["loss"] == {1: 3.0, 2: 2.0, 3: 1.0}


@pytest.mark.parametrize("lost", [1, 5, 30])
def test_a_cut_file_gives_what_is_whole(tmp_path, lost):
    write_events(tmp_path, {"loss": {1: 3.0, 2: 2.0}})
    (file,) = event_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-lost])
    found = read_events([file])
    assert found.scalars["loss"] == {1: 3.0}
    assert found.problems == [f"{file.name}: the last record is cut; what comes before is read"]


def test_a_file_of_something_else_is_told(tmp_path):
    (tmp_path / "events.out.tfevents.1.x").write_bytes(b"something else altogether")
    run = read_board(tmp_path)
    assert any("byte 0 begins no record" in line for line in run.problems)
    assert "the event files hold no scalars" in run.problems


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("loss", "train/loss"), ("eval_loss", "eval/loss"), ("train/loss", "train/loss"), ("val_loss", "eval/loss"),
        ("validation/loss", "eval/loss"), ("lr", "train/learning_rate"), ("eval/accuracy", "eval/accuracy"),
        ("train_loss", "train/loss"), ("grad_norm", "train/grad_norm"),
    ],
)  # fmt: skip
def test_metrics_have_our_names(theirs, ours):
    assert metric_name(theirs) == ours


# ---- CSV ----------------------------------------------------------------------------------------------------------


def table(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_a_table_of_steps_is_a_run(tmp_path):
    file = table(tmp_path, "first.csv", "step,train/loss,eval/loss\n1,2.5,\n2,2.0,2.25\n3,nan,\n")
    (run,) = read_tables([file])
    assert (run.name, run.source) == ("first", "csv")
    assert run.train.of("train/nll")[1].tolist() == [2.5, 2.0, math.inf]
    assert run.eval.of("eval/nll")[1].tolist() == [2.25]
    assert run.config == {}
    assert run.problems[-1].startswith("not said: the base, rank, learning rate")


def test_broken_lines_are_counted_and_left_out(tmp_path):
    file = table(tmp_path, "a.csv", "step,loss\n1,2.5\nx,1\n3,high\n4\n5,1.5\n\n")
    (run,) = read_tables([file])
    assert run.train.of("train/nll")[0].tolist() == [1, 5]
    assert run.problems[0] == "a.csv: 3 lines could not be read (line 3, 4, 5)"


def test_exports_of_weights_and_biases_hold_a_run_a_column(tmp_path):
    text = '"Step","a - train/loss","a - train/loss__MIN","b - train/loss"\n1,3,3,4\n2,2,2,\n'
    runs = read_tables([table(tmp_path, "wandb_export.csv", text)])
    assert {run.name: run.train.of("train/nll")[1].tolist() for run in runs} == {"a": [3.0, 2.0], "b": [4.0]}


def test_what_a_sweep_tells_tensorboard_is_no_run(tmp_path):
    write_events(tmp_path, {"loss": {1: 1.0}})
    write_run(tmp_path / "trial")
    assert len(read_all([tmp_path])) == 2
    (tmp_path / "sweep.json").write_text("{}")
    assert [run.name for run in read_all([tmp_path])] == ["trial"]


def test_exports_of_tensorboard_hold_a_metric_a_file(tmp_path):
    files = [
        table(tmp_path, "run-Nov22-tag-train_loss.csv", "Wall time,Step,Value\n1,1,3.0\n2,2,2.5\n"),
        table(tmp_path, "run-Nov22-tag-eval_loss.csv", "Wall time,Step,Value\n1,2,2.75\n"),
    ]
    (run,) = read_tables(files)
    assert run.name == "Nov22"
    assert run.train.of("train/nll")[1].tolist() == [3.0, 2.5]
    assert run.eval.of("eval/nll")[1].tolist() == [2.75]


def test_a_column_of_names_holds_many_runs(tmp_path):
    runs = read_tables([table(tmp_path, "all.csv", "run,step,loss\nb,1,3\na,1,2\nb,2,1\n")])
    assert {run.name: run.train.of("train/nll")[1].tolist() for run in runs} == {"b": [3.0, 1.0], "a": [2.0]}


# ---- finding ------------------------------------------------------------------------------------------------------


def test_a_pile_is_read_at_once(tmp_path):
    write_run(tmp_path / "sweep/ours")
    trainer(tmp_path)
    (tmp_path / "board").mkdir()
    write_events(tmp_path / "board", {"loss": {1: 1.0}})
    table(tmp_path, "curve.csv", "step,loss\n1,2\n")
    table(tmp_path, "data.csv", "question,answer\na,b\n")
    assert {(run.name, run.source) for run in read_all([tmp_path])} == {
        ("ours", "jaxlora"), ("Nov22_10-57", "transformers"), ("board", "tensorboard"), ("curve", "csv"),
    }  # fmt: skip
    assert [run.source for run in read_all([tmp_path], "csv")] == ["csv"]
    assert len(read_all([tmp_path, tmp_path / "board", tmp_path / "curve.csv"])) == 4  # each once


def test_our_own_event_files_are_no_second_run(tmp_path):
    write_run(tmp_path / "ours")
    (tmp_path / "ours/tensorboard").mkdir()
    write_events(tmp_path / "ours/tensorboard", {"loss": {1: 1.0}})
    assert [run.source for run in read_all([tmp_path])] == ["jaxlora"]


@pytest.mark.parametrize(
    ("place", "only", "message"),
    [
        ("", "mlflow", "--format mlflow: known are jaxlora, transformers, tensorboard, csv"),
        ("nowhere", "", "there is no .*nowhere: give the folder"),
        ("", "", "no run in .*\n.*config.json.*trainer_state.json.*events.out.tfevents.*csv"),
        ("", "tensorboard", r"no run in .*\n.*tensorboard \(events.out"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, place, only, message):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(InputError, match=message):
        read_all([tmp_path / place], only)
