"""The sweep command, from its arguments to what it says, over a stand-in for training."""

import dataclasses
import functools
import io
import json
import os
import re
import signal
import sys
import threading
import time

import pytest

from jaxlora import sweep
from jaxlora.config import build
from jaxlora.core import cli
from jaxlora.runs.board import TrialBoard
from jaxlora.runs.directory import RunDirectory
from jaxlora.runs.progress import Progress
from jaxlora.sweeps.ledger import Ledger
from tests.sweeps import standin

RATES = "grid = {'optim.learning_rate': [1e-4, 1e-3, 1e-2]}"


@pytest.fixture
def stand_in(monkeypatch):
    """Puts the stand-in in the place of what trains; returns it, and makes it as slow as it is told to be."""
    monkeypatch.setitem(sys.modules, "jaxlora.config.build.sweeping", standin)
    monkeypatch.setattr(build, "sweeping", standin, raising=False)
    monkeypatch.setattr("jaxlora.core.compilation.use_persistent_cache", lambda: None)
    calls = []
    run = functools.partial(standin.run)

    def counted(trials, folder, **rest):
        calls.append(([trial.name for trial in trials], rest))
        return run(trials, folder, **rest, pace=counted.pace)

    counted.pace = 0.0
    counted.calls = calls
    monkeypatch.setattr(standin, "run", counted)
    return counted


@pytest.fixture
def call(capfd, monkeypatch, tmp_path, stand_in):
    """call(line, ..., flags) runs the command on a sweep of these lines in tmp_path/s; its code, stdout and stderr."""

    def call(*lines, flags=(), workdir="s"):
        file = tmp_path / "mine.py"
        body = "\n".join(f"    config.sweep.{line}" for line in lines)
        file.write_text(
            "from jaxlora.config.load import base_config\nfrom jaxlora.config.sweep import sweep_config\n\n\n"
            "def get_config():\n    base = base_config()\n    base.model.path, base.data.train = 'm', 'd'\n"
            f"    base.train.max_steps, base.optim.warmup_steps = 20, 4\n    config = sweep_config(base)\n{body}\n"
            "    return config\n"
        )
        arguments = [
            "--config",
            str(file),
            *flags,
            *(["--workdir", str(tmp_path / workdir)] if workdir else []),
        ]
        monkeypatch.setattr(sys, "argv", ["jaxlora.sweep", *arguments])
        monkeypatch.chdir(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.run(sweep.main)
        return left.value.code, *capfd.readouterr()

    return call


def order(out):
    """The names in the ranking."""
    lines = out[out.index("ranking\n") :].splitlines()[2:]
    return [line.split()[0] for line in lines[: lines.index("what came of it")]]


def record(tmp_path, name):
    return RunDirectory.read(tmp_path / "s" / name).record


# ---- what a person sees -------------------------------------------------------------------------------------------


def test_the_ranking_the_winner_and_the_next_sweep_are_told(call, tmp_path):
    code, out, _ = call(RATES)
    assert code == 0
    assert order(out) == ["learning_rate=0.01", "learning_rate=0.001", "learning_rate=0.0001"]
    assert re.search(r"learning_rate=0\.001 +2\.5403 +\+1\.4864 ± 0\.000\d +20 +20 +finished", out)
    assert f"generate --run {tmp_path}/s/learning_rate=0.01" in out
    assert (
        "optim.learning_rate: the best, 0.01, is the highest that was tried: widen it, for example with 0.1"
        in out
    )
    assert "the best was still getting better at its last step, 20" in out
    assert re.search(
        r"time +\d.* an estimated .* \(3 x \d+ s until the first step, 60 x [\d.]+ ms a step\)", out
    )


def test_plain_lines_tell_where_all_are(call):
    out = call(RATES)[1]
    assert re.search(r"step 5/20  3 training  train nll 1\.\d+ \(learning_rate=0\.01\) to 4\.\d+", out)
    assert "learning_rate=0.001: eval at step 5: nll" in out
    assert "learning_rate=0.001: finished: all 20 steps done" in out


def test_a_dry_run_lists_trials_and_groups_and_makes_nothing(call, tmp_path):
    code, out, _ = call("grid = {'train.batch_size': [8, 16], 'seed': [0, 1]}", flags=["--dry-run"])
    assert code == 0
    assert "4 trials in 4 groups" in out  # the seed draws what is held out
    code, out, _ = call(
        "trials = [{'name': 'a', 'train.batch_size': 8}, {'name': 'b'}, {'name': 'c', 'optim.b1': 0.8}]",
        flags=["--dry-run"],
    )
    assert re.search(r"group 1: 1 trial, with train\.batch_size = 8\n  a  batch_size=8\n", out)
    assert re.search(
        r"group 2: 2 trials, with train\.batch_size = 128\n  b  the base config\n  c  b1=0\.8\n", out
    )
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("base", "columns"),
    [
        ([], ["eval/nll", "train/nll", "train_eval/nll", "eval/token_accuracy"]),
        (
            ["base.eval.train_examples = 0", "base.eval.metrics = ('nll', 'perplexity')"],
            ["eval/nll", "train/nll"],
        ),
    ],
)
def test_tensorboard_has_columns_of_what_the_trials_log_alone(call, tmp_path, base, columns):
    """For its parallel coordinates leave out whoever lacks a value in one of them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    call(RATES, flags=[f"--config.{line.replace(' = ', '=')}" for line in base])
    events = EventAccumulator(str(tmp_path / "s")).Reload()
    content = events.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    infos = metadata.parse_experiment_plugin_data(content).metric_infos
    assert [info.name.tag for info in infos] == columns


def test_a_folder_is_named_by_the_time(call, tmp_path):
    call(RATES, workdir=None)
    (found,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"[A-Z][a-z]{2}\d\d_\d\d-\d\d-\d\d_mine", found.name)


@pytest.fixture
def board(monkeypatch):
    """A board of three trials on a plain display, the clock at hand."""
    progress = Progress(output=io.StringIO())
    return TrialBoard([("a", "x=1"), ("b", "x=2"), ("c", "x=3")], progress)


def shown(board, width=100, height=20):
    from rich.console import Console

    console = Console(width=width, file=io.StringIO())
    console.print(board.table(width, height))
    return console.file.getvalue().splitlines()


def test_the_table_is_sorted_by_eval_nll(board):
    for name, nll in (("a", 1.5), ("b", float("nan")), ("c", 1.25)):
        board.state(name, "training")
        board.step(name, 10, 40)
        board.train(name, step=10, nll=nll + 0.1)
        board.evaluated(name, 10, {"eval/nll": nll}, {"step": 10, "eval/nll": nll})
    lines = shown(board)
    assert lines[0].split() == "trial what differs step train nll eval nll best state".split()
    assert [line.split()[0] for line in lines[1:4]] == ["c", "a", "b"]
    assert lines[1].split() == ["c", "x=3", "10/40", "1.3500", "1.2500", "1.2500", "at", "10", "training"]
    assert "not finite" in lines[3]


def test_a_short_terminal_sees_the_best_and_how_many_more(board):
    lines = shown(board, height=4)
    assert lines[1].split()[0] == "a"
    assert "and 1 more" in lines[-1]


def test_a_terminal_is_spared_what_the_table_shows(board):
    board._progress.interactive = True
    board._progress.say = (said := []).append
    board.say("eval at step 5: nll 1.2", "a")
    board.say("early stop: 1 of 3 evaluations without improvement", "a")
    board.say("overfitting since step 5", "a")
    board.say("compiling again for 4 trials")
    assert said == ["a: overfitting since step 5", "compiling again for 4 trials"]


def test_ends_are_told_once_and_leaving_not_at_all(board):
    board._progress.say = (said := []).append
    board.state("a", "diverged", "the loss is not finite")
    board.state("a", "diverged", "the loss is not finite")
    board.state("b", "preempted", "asked to leave")
    assert said == ["a: diverged: the loss is not finite"]


def test_the_time_left_knows_nothing_of_what_came_before_the_steps(board, monkeypatch):
    """The trials are ready after a minute, evaluated for two, one of them goes on from step 3; a step takes 10 s."""
    clock = [60.0]
    monkeypatch.setattr("jaxlora.runs.board.time.monotonic", lambda: clock[0])
    for name, step in (("a", 0), ("b", 0), ("c", 3)):
        board.state(name, "training")
        board.step(name, step, 10)
        clock[0] += 40
    assert "left" not in board.line()
    for step in (1, 2):
        clock[0] += 10
        for name in ("a", "b"):
            board.step(name, step, 10)
    # Two make a step in 10 s, which is 5 s for each of the 8 + 8 + 7 steps that are left.
    assert board.line().endswith("1:55 left")


def test_there_is_never_a_long_silence(board, monkeypatch):
    monkeypatch.setattr("jaxlora.runs.progress.SILENCE", 0.05)
    with board._progress as progress:
        progress.board(board)
        board.state("a", "training")
        board.step("a", 3, 9)
        time.sleep(0.6)
        progress.board(None)
    assert "step 3/9  1 training  2 waiting" in progress._output.getvalue()


# ---- what it leaves, and going on -----------------------------------------------------------------------------------


def test_a_repeated_command_trains_nothing(call, stand_in):
    first = call(RATES)[1]
    code, again, _ = call(RATES)
    assert code == 0
    assert len(stand_in.calls) == 1
    assert order(again) == order(first)
    assert "what will be done" not in again


def test_a_request_leaves_and_the_same_command_goes_on(call, stand_in, tmp_path):
    stand_in.pace = 0.02
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    code, out, _ = call(RATES)
    assert code == 0
    assert "SIGTERM: saving after this step and leaving" in out
    assert 0 < record(tmp_path, "learning_rate=0.001")["steps"] < 20
    assert re.search(r"to go on +python -m jaxlora\.sweep --config .*mine\.py --workdir .*/s\n", out)
    assert "widen it" not in out
    stand_in.pace = 0.0
    code, out, _ = call(RATES)
    assert record(tmp_path, "learning_rate=0.001")["status"] == "finished"
    assert "one after another" not in out  # a part of it was measured by another call


def test_dropped_trials_are_ended_and_say_so(call, stand_in, tmp_path):
    lines = (RATES, "halving.rungs = (0.5,)")
    code, out, _ = call(*lines)
    assert code == 0
    assert "at 50 % of a run the best 1/2 are kept (ties stay)" in out
    assert re.search(r"learning_rate=0\.0001 .* 10 +dropped", out)
    assert record(tmp_path, "learning_rate=0.0001")["status"] == "preempted"
    assert call(*lines)[0] == 0
    assert len(stand_in.calls) == 1


def test_what_was_not_written_is_told_and_shows_in_the_exit_code(call, stand_in, monkeypatch):
    outcome = standin.outcome
    monkeypatch.setattr(
        standin,
        "outcome",
        lambda folder, trial: dataclasses.replace(
            outcome(folder, trial), lost=trial.name == "learning_rate=0.01"
        ),
    )
    code, out, _ = call(RATES)
    assert code == 1
    assert "not all was written of learning_rate=0.01.\nMake room, and repeat the command" in out


def test_one_that_was_finished_alone_since_is_dropped_no_more(call, tmp_path):
    lines = (RATES, "halving.rungs = (0.5,)")
    call(*lines)
    with_end = RunDirectory.read(tmp_path / "s/learning_rate=0.0001")
    with_end.update_record(status="finished", steps=20)
    assert re.search(r"learning_rate=0\.0001 .* 20 +finished", call(*lines)[1])


def test_a_diverged_trial_costs_the_others_nothing(call):
    code, out, _ = call("grid = {'optim.learning_rate': [1e-3, 0.5]}")
    assert code == 0
    assert re.search(r"learning_rate=0\.5 +- +- +3 +diverged", out)
    assert order(out) == ["learning_rate=0.001", "learning_rate=0.5"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["grid = {'optim.learning_rate': [1e-4, 1e-3]}"], "holds another sweep: trial learning_rate=0.01 is not"),
        ([RATES, "halving.rungs = (0.5,)"], "holds another sweep: sweep.halving is not what it was"),
    ],
)  # fmt: skip
def test_a_folder_goes_on_with_its_own_sweep_alone(call, lines, said):
    call(RATES)
    code, _, err = call(*lines)
    assert code == 2
    assert said in err


def test_another_base_is_another_sweep_but_on_other_devices_it_is_the_same(call):
    call(RATES)
    assert call(RATES, flags=["--config.base.mesh.data=1"])[0] == 0
    code, _, err = call(RATES, flags=["--config.base.train.max_steps=30"])
    assert code == 2
    assert "holds another sweep: base.train.max_steps is not what it was" in err


def test_a_sweep_older_than_a_key_goes_on_with_the_keys_default(call, tmp_path):
    call(RATES)
    files = [tmp_path / "s/sweep.json", *(tmp_path / "s").glob("*/config.json")]
    for file in files:
        told = json.loads(file.read_text())
        if file.name == "sweep.json":
            del told["sweep"]["base"]["model.quantize"]
        else:
            del told["model"]["quantize"]
        file.write_text(json.dumps(told))
    code, _, err = call(RATES, flags=["--config.base.model.quantize=int8"])
    assert code == 2
    assert "holds another sweep: base.model.quantize is not what it was" in err
    assert call(RATES)[0] == 0


def test_trials_may_be_added(call, stand_in):
    call(RATES)
    code, out, _ = call(RATES.replace("1e-2]", "1e-2, 2e-2]"))
    assert code == 0
    assert len(order(out)) == 4
    assert re.search(r"ended +3 of them, before", out)


def test_a_folder_of_something_else_is_refused(call, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/notes.txt").write_text("mine")
    code, _, err = call(RATES)
    assert code == 2
    assert "is not empty and holds no sweep (it has notes.txt)" in err


def test_two_commands_do_not_share_a_folder(call, tmp_path):
    from jaxlora.runs.files import lock_folder, release

    (tmp_path / "s").mkdir()
    lock = lock_folder(tmp_path / "s")
    try:
        assert "in use by process" in call(RATES)[2]
    finally:
        release(lock)


def test_wrong_input_that_training_finds_names_the_bases_keys(call, stand_in, monkeypatch):
    from jaxlora.core.errors import InputError

    def refuse(*_, **__):
        raise InputError("eval.batch_size = 3 does not divide; set --config.eval.batch_size=4.")

    monkeypatch.setattr(standin, "run", refuse)
    code, _, err = call(RATES)
    assert code == 2
    assert err.startswith("error: eval.batch_size = 3 does not divide; set --config.base.eval.batch_size=4.")


# ---- a search -------------------------------------------------------------------------------------------------------

SEARCH = (
    "search.ranges = {'optim.learning_rate': ('log_uniform', 1e-5, 1e-1)}",
    "search.waves = 3",
    "search.trials = 4",
)


def test_each_wave_of_a_search_is_one_call(call, stand_in, tmp_path):
    code, out, _ = call(*SEARCH)
    assert code == 0
    assert [len(names) for names, _ in stand_in.calls] == [4, 4, 4]
    assert len(order(out)) == 12
    assert [len(wave) for wave in Ledger(tmp_path / "s").get("waves")] == [4, 4, 4]
    assert (
        len(re.findall(r"^step 5/20 .*4 training", out, re.MULTILINE)) == 3
    )  # in each wave, from its first step
    assert len({id(rest["bases"]) for _, rest in stand_in.calls}) == 1


def test_a_stopped_search_goes_on_as_if_it_had_not_been(call, stand_in, tmp_path):
    stand_in.pace = 0.01
    threading.Timer(1.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    call(*SEARCH)
    assert 0 < len(stand_in.calls) < 3
    stand_in.pace = 0.0
    call(*SEARCH)
    undisturbed = call(*SEARCH, workdir="undisturbed")[1]
    assert order(undisturbed) == order(call(*SEARCH)[1])
    assert Ledger(tmp_path / "s").get("waves") == Ledger(tmp_path / "undisturbed").get("waves")
