"""launch/gpu.sh: one machine with GPUs, in the background, across crashes and reboots."""

import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable

import pytest

from tests.launch.stage import LAUNCH

SCRIPT = "gpu.sh"
TRAIN = ["--", "--config", "configs/qwen7b.py", "--config.journal.hypothesis=100 % of it's rows"]


def environment(stage) -> str:
    assert stage.run(SCRIPT, "install").returncode == 0
    return f"{stage.checkout}/.venv"


def wait_until(holds: Callable[[], bool], seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it does not come about"
        time.sleep(0.05)


def wait_until_not_running(stage) -> None:
    wait_until(lambda: "not running" in stage.run(SCRIPT, "status", "--workdir", "runs/one").stdout)


def test_install_makes_an_environment_for_cuda(stage):
    venv = environment(stage)
    assert [call.line for call in stage.calls("python3") if "venv" in call.arguments] == [
        f"python3 -m venv --clear {venv}"
    ]
    (pip,) = [call.arguments for call in stage.calls("python") if "install" in call.arguments]
    assert pip[-3:] == ("-r", f"{stage.checkout}/requirements.txt", "jax[cuda13]")
    stage.forget()
    assert stage.run(SCRIPT, "install", "--cuda=12").returncode == 0  # the environment is there now
    assert not [call for call in stage.calls("python3") if "venv" in call.arguments]
    (pip,) = [call.arguments for call in stage.calls("python") if "install" in call.arguments]
    assert pip[-1] == "jax[cuda12]"


def test_a_run_in_the_background_and_its_log(stage):
    venv = environment(stage)
    done = stage.run(SCRIPT, "run", "--workdir", "runs/one", *TRAIN)
    assert done.returncode == 0, done.stderr
    run = f"{stage.home}/runs/one"
    log = stage.wait_for(stage.home / "runs/one.log", "exit code 0")
    (training,) = stage.trainings()
    assert training.arguments == ("-m", "jaxlora.train", *TRAIN[1:], "--workdir", run)
    assert training.folder == str(stage.checkout)
    assert f"{venv}/bin/python -m jaxlora.train" in log
    assert stage.run(SCRIPT, "log", "--workdir", run).stdout == log
    status = stage.run(SCRIPT, "status", "--workdir", run).stdout
    assert status == f"{run}: not running; its record says: nothing yet\n"


def test_a_crash_is_gone_on_after_and_wrong_input_is_not(stage):
    environment(stage)
    stage.set("train", 'echo x >>"$STAGE/starts"; (($(wc -l <"$STAGE/starts") > 1)) || exit 1')
    stage.run(SCRIPT, "run", "--workdir", "runs/one", *TRAIN)
    stage.wait_for(stage.home / "runs/one.log", "exit code 0")
    first, second = stage.trainings()
    assert first.arguments == second.arguments
    stage.set("train", "exit 2")
    stage.run(SCRIPT, "run", "--workdir", "runs/two", *TRAIN)
    stage.wait_for(stage.home / "runs/two.log", "exit code 2")
    assert len(stage.trainings()) == 3


@pytest.mark.slow
def test_a_real_run_that_is_killed_goes_on_and_ends(stage):
    """The quickstart, with this very Python: only the driver and the pause before the restart are stand-ins."""
    steps = "train.max_steps=12 checkpoint.every=4 eval.every=12 eval.generate=0".split()
    train = ["--", "--config", "configs/quickstart.py", *(f"--config.{key}" for key in steps)]
    run = stage.home / "runs/one"
    options = ["--workdir", str(run), "--venv", sys.prefix]
    offline = {
        name: os.environ[name] for name in ("JAX_PLATFORMS", "HF_HUB_OFFLINE", "HF_HOME", "XDG_CACHE_HOME")
    }
    done = stage.run(LAUNCH / SCRIPT, "run", *options, *train, **offline)
    assert done.returncode == 0, done.stderr
    checkpoint = run / "checkpoints/4"
    wait_until(checkpoint.exists)
    supervisor = (stage.home / "runs/one.pid").read_text().strip()
    (training,) = stage.run("/usr/bin/ps", "-o", "pid=", "--ppid", supervisor).stdout.split()
    os.kill(int(training), signal.SIGKILL)
    log = stage.home / "runs/one.log"
    wait_until(lambda: log.read_text().count("exit code") == 2)
    told = log.read_text()
    assert "exit code 137\n== again in 10 s (restart 1 of 3)" in told
    assert re.search(r"going on after step (4|8)\n", told)
    assert told.endswith("exit code 0\n")
    status = stage.run(LAUNCH / SCRIPT, "status", *options).stdout
    assert status == f"{run}: not running; its record says: finished\n"
    assert "has ended (finished)" in stage.run(LAUNCH / SCRIPT, "run", *options, *train).stderr


def test_a_reboot_is_gone_on_after(stage):
    """Cron's line is executed as cron would: by sh, with \\% for %."""
    environment(stage)
    others = "0 4 * * * backup\n@reboot true # jaxlora " + f"{stage.home}/runs/one-more\n"
    stage.set("crontab", others)
    stage.set("train", "kill -KILL $PPID $$")  # the power fails
    for _ in range(2):  # a second run has no second line
        stage.run(SCRIPT, "run", "--workdir", "runs/one", "--at-reboot", "--restarts", "1", *TRAIN)
        wait_until_not_running(stage)
    before = {call.arguments for call in stage.trainings()}
    crontab = (stage.folder / "crontab").read_text()
    assert crontab.startswith(others)
    (line,) = crontab.removeprefix(others).splitlines()
    assert not re.search(r"(?<!\\)%", line)  # a bare one ends the line for cron
    stage.forget()
    stage.set("train", "exit 1")
    assert stage.run("/bin/sh", "-c", line.removeprefix("@reboot ").replace("\\%", "%")).returncode == 0
    told = stage.wait_for(stage.home / "runs/one.log", "not started again")
    assert "started 2 times, and 1 restarts are allowed" in told
    assert [call.arguments for call in stage.trainings()] == list(before)  # the one restart that was left

    assert stage.run(SCRIPT, "stop", "--workdir", "runs/one").returncode == 0
    assert (stage.folder / "crontab").read_text() == others


def test_a_run_that_has_ended_leaves_the_crontab(stage):
    environment(stage)
    run = stage.home / "runs/one"
    stage.set("crontab", f"@reboot true # jaxlora {run}\n")
    run.mkdir(parents=True)
    (run / "record.json").write_text('{"status": "stopped_early"}')
    done = stage.run(SCRIPT, "run", "--workdir", "runs/one", *TRAIN)
    assert "this run has ended (stopped_early)" in done.stderr
    assert stage.trainings() == []
    assert (stage.folder / "crontab").read_text() == ""


@pytest.mark.parametrize("step", [["install"], ["run", "--at-reboot"], ["log"], ["status"], ["stop"]])
def test_a_dry_run_changes_nothing(stage, step):
    workdir = [] if step == ["install"] else ["--workdir", "runs/one"]
    words = [*step, *workdir, "--dry-run", *(TRAIN if "run" in step else [])]
    before = set(stage.folder.rglob("*"))
    done = stage.run(SCRIPT, *words)
    assert done.returncode == 0, done.stderr
    asked = {call.name for call in stage.calls()}
    assert asked <= {
        "nvidia-smi",
        *(f"python3{minor}" for minor in ("", ".11", ".12", ".13")),
    }  # what is here
    assert set(stage.folder.rglob("*")) - before <= {stage.folder / "calls"}
    if "run" in step:
        train = ["-m", "jaxlora.train", *TRAIN[1:], "--workdir", f"{stage.home}/runs/one"]
        *command, log, errors, nothing, background = shlex.split(done.stdout.splitlines()[-1])
        assert command[:2] == ["setsid", "nohup"]
        assert command[-len(train) :] == train
        assert [log, errors, nothing, background] == [
            f">>{stage.home}/runs/one.log",
            "2>&1",
            "</dev/null",
            "&",
        ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["start"], "there is no command 'start'; there are install, run, log, status, stop"),
        (["run", *TRAIN], "run needs the run's folder, for example --workdir"),
        (["run", "--workdir", "r"], "nothing to train: give -- --config FILE"),
        (["run", "--workdir", "r", "--restarts", "-1", *TRAIN], "--restarts is '-1'; give a whole number"),
        (["run", "--workdir", "r", "--gpus", "2", *TRAIN], "there is no option '--gpus'"),
        (
            ["run", "--workdir", "r", *TRAIN],
            "there is no virtual environment; run launch/gpu.sh install first",
        ),
        (["install", "--cuda", "11"], "--cuda is '11'; give 13 or 12"),
    ],
)
def test_bad_input_is_one_line(stage, words, told):
    done = stage.run(SCRIPT, *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert told in done.stderr


@pytest.mark.parametrize(
    ("driver", "told"),
    [
        ("", "nvidia-smi finds no NVIDIA GPU here; install the driver (version 580 or later) first"),
        (
            "550.54.15\n",
            "the NVIDIA driver is 550.54.15, and CUDA 13 needs 580 or later; update it, or give --cuda 12",
        ),
    ],
)
def test_a_driver_that_does_not_do_is_told(stage, driver, told):
    stage.set("driver", driver)
    done = stage.run(SCRIPT, "install")
    assert (done.returncode, done.stderr) == (2, f"gpu.sh: {told}\n")
    assert stage.calls("python") == []
