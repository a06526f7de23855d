"""Curves in metrics.jsonl and, through CLU, in TensorBoard: complete, once each, and never in the run's way."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxlora.runs import writers as module
from jaxlora.runs.directory import RunDirectory
from jaxlora.runs.writers import Writers, compare_in_tensorboard

CONFIG = {
    "optim": {"learning_rate": 1e-4},
    "lora": {"targets": ["q_proj", "v_proj"], "rank": 8},
    "stop": {"patience": None},
}

# TensorFlow's import warns of its own affairs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def read(run: RunDirectory):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.tensorboard), tensor_size_guidance={"scalars": 0, "text": 0})
    return events.Reload()


def scalars(events, tag: str) -> list[tuple[int, float]]:
    from tensorboard.util import tensor_util

    return [
        (event.step, float(tensor_util.make_ndarray(event.tensor_proto))) for event in events.Tensors(tag)
    ]


def test_scalars_hparams_and_texts_reach_tensorboard(tmp_path):
    from tensorboard.plugins.hparams import metadata

    with RunDirectory.open(tmp_path / "run", CONFIG) as run, Writers(run) as writers:
        writers.hparams(run.config)
        for step in range(1, 31):
            writers.scalars(step, {"train/nll": 1 / step, "reason": "text is for metrics.jsonl only"})
        writers.texts(30, {"answers": "**before** 1, after 2"})
        assert len(run.metrics()) == 30  # at once
    assert writers.problems() == []
    events = read(run)
    assert scalars(events, "train/nll") == [
        (step, pytest.approx(1 / step, rel=1e-6)) for step in range(1, 31)
    ]
    (text,) = events.Tensors("answers")
    assert text.step == 30
    assert text.tensor_proto.string_val[0] == b"**before** 1, after 2"
    summary = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG)
    shown = metadata.parse_session_start_info_plugin_data(summary.plugin_data.content).hparams
    assert shown["optim.learning_rate"].number_value == 1e-4
    assert shown["lora.rank"].number_value == 8
    assert shown["lora.targets"].string_value == "q_proj, v_proj"
    assert shown["stop.patience"].string_value == "None"


def test_a_resumed_run_shows_each_step_once(tmp_path):
    with RunDirectory.open(tmp_path, CONFIG) as run, Writers(run) as writers:
        for step in range(1, 11):
            writers.scalars(step, {"x": 1.0})
    with RunDirectory.open(tmp_path, CONFIG) as run:
        run.truncate(after_step=6)
        with Writers(run) as writers:
            for step in range(7, 13):
                writers.scalars(step, {"x": 2.0})
    assert scalars(read(run), "x") == [(step, 1.0 if step <= 6 else 2.0) for step in range(1, 13)]


@pytest.mark.parametrize("writers_before", [0, 90_000_000])
def test_a_run_that_goes_back_shows_each_step_once_and_its_hyperparameters(
    tmp_path, monkeypatch, writers_before
):
    from tensorboard.plugins.hparams import metadata
    from tensorboard.summary.writer import event_file_writer

    # What a process has written before must not count: event files begun in one second are read by such a count, as
    # text, the tenth before the ninth.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(writers_before))
    with RunDirectory.open(tmp_path, CONFIG) as run, Writers(run) as writers:
        writers.hparams(run.config)
        for step in range(1, 11):
            writers.scalars(step, {"x": 1.0})
        for back, value in ((6, 2.0), (4, 3.0)):
            writers.forget(back)
            for step in range(back + 1, 11):
                writers.scalars(step, {"x": value})
    events = read(run)
    assert scalars(events, "x") == [(step, 1.0 if step <= 4 else 3.0) for step in range(1, 11)]
    shown = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    assert metadata.parse_session_start_info_plugin_data(shown).hparams["lora.rank"].number_value == 8


def test_a_nonfinite_scalar_is_written_as_such(tmp_path):
    with RunDirectory.open(tmp_path, CONFIG) as run, Writers(run) as writers:
        writers.scalars(1, {"x": float("inf")})
    assert scalars(read(run), "x") == [(1, float("inf"))]
    assert run.metrics() == [{"step": 1, "x": None, "x/nonfinite": "inf"}]


def test_flush_waits_for_what_was_written(tmp_path):
    with RunDirectory.open(tmp_path, CONFIG) as run, Writers(run) as writers:
        writers.scalars(1, {"x": 1.0})
        writers.flush()
        assert scalars(read(run), "x") == [(1, 1.0)]


def test_when_tensorboard_cannot_be_written_the_run_goes_on_and_says_so(tmp_path):
    with RunDirectory.open(tmp_path, CONFIG) as run:
        run.tensorboard.touch()  # a file where the folder should be
        with Writers(run) as writers:
            writers.scalars(1, {"x": 1.0})
            writers.flush()
            writers.scalars(2, {"x": 1.0})
        assert len(run.metrics()) == 2
    (problem,) = writers.problems()
    assert "TensorBoard" in problem
    assert writers.problems() == []


def test_a_writer_that_wrote_nothing_imports_and_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_open", lambda *_: pytest.fail("TensorFlow would be imported"))
    with RunDirectory.open(tmp_path, CONFIG) as run, Writers(run):
        assert "tensorboard" not in [thread.name for thread in threading.enumerate()]


def run_program(program: str, folder: Path) -> tuple[int, str, str]:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}  # as `writers` sets it where nobody did
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_program_writes_curves_without_a_word_of_tensorflow(tmp_path):
    program = """
import sys
from jaxlora.runs.directory import RunDirectory
from jaxlora.runs.writers import Writers
with RunDirectory.open(sys.argv[1], {}) as run, Writers(run) as writers:
    writers.scalars(1, {"x": 1.0})
    assert "clu.metric_writers" not in sys.modules, "the first scalar waited for TensorFlow"
"""
    assert run_program(program, tmp_path) == (0, "", "")
    assert scalars(read(RunDirectory.read(tmp_path)), "x") == [(1, 1.0)]


def test_a_program_that_fails_without_closing_still_ends(tmp_path):
    program = """
import sys
from jaxlora.runs import writers
from jaxlora.runs.directory import RunDirectory
writers._open = lambda *_: writers._Nowhere()
writers.Writers(RunDirectory.open(sys.argv[1], {})).scalars(1, {"x": 1.0})
sys.exit("failed")
"""
    assert run_program(program, tmp_path) == (1, "", "failed\n")


def test_a_folder_of_runs_is_compared_by_what_differs(tmp_path):
    """As TensorBoard's own HParams plugin reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    for rates in ([1e-3], [1e-3, 1e-4]):  # the second in place of the first
        differing = {"optim.learning_rate": rates, "lora.targets": ["all-linear", ["q_proj", "v_proj"]]}
        compare_in_tensorboard(tmp_path, differing, ["eval/nll"])
    events = EventAccumulator(str(tmp_path)).Reload()
    content = events.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    experiment = metadata.parse_experiment_plugin_data(content)
    assert [(info.name, [v.number_value or v.string_value for v in info.domain_discrete.values])
            for info in experiment.hparam_infos] == [
        ("optim.learning_rate", [1e-4, 1e-3]), ("lora.targets", ["all-linear", "q_proj, v_proj"]),
    ]  # fmt: skip
    assert [info.name.tag for info in experiment.metric_infos] == ["eval/nll"]
    assert len(list(tmp_path.iterdir())) == 1
