"""launch/slurm.sbatch: what it asks Slurm for, what srun starts, and when the job is put back."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.launch.stage import LAUNCH

SCRIPT = "slurm.sbatch"
TRAIN = ["--config", "configs/qwen7b.py", "--workdir", "runs/one"]
JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]"}


def job(stage, *words: str, status: str = "", **more: str):
    if status:
        run = stage.home / "runs/one"
        run.mkdir(parents=True, exist_ok=True)
        (run / "record.json").write_text(json.dumps({"status": status, "steps": 7}, indent=2))
    return stage.run(
        spooled(stage), *words, **{**JOB, "JAXLORA_PYTHON": str(stage.folder / "python"), **more}
    )


def spooled(stage) -> Path:
    """sbatch runs a copy, from a folder of Slurm's own, in the folder it was called in."""
    copy = stage.folder / "slurm_script"
    shutil.copy(LAUNCH / SCRIPT, copy)
    return copy


def requeued(stage) -> list[str]:
    return [call.line for call in stage.calls("scontrol")]


def test_what_it_asks_slurm_for():
    lines = (LAUNCH / SCRIPT).read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", "\n".join(lines[:first_command]), flags=re.M))
    assert len(asked) == sum("#SBATCH" in line for line in lines)  # sbatch reads none after the first command
    # JAX takes the GPU of the task's number on its node: one task a GPU, and every task sees all of them.
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert "gpus-per-task" not in asked
    signal, seconds = asked["signal"].split("@")  # without B:, to the processes
    assert (signal, int(seconds) >= 120) == ("TERM", True)
    assert "requeue" in asked
    assert asked["open-mode"] == "append"


def test_every_task_trains(stage):
    done = job(stage, *TRAIN, status="finished")
    assert done.returncode == 0, done.stderr
    assert [call.arguments[2:] for call in stage.trainings()] == [tuple(TRAIN)] * 2
    assert requeued(stage) == []


def test_a_job_that_saved_and_left_is_put_back(stage):
    done = job(stage, *TRAIN[:2], "--workdir=runs/one", status="preempted")
    assert (done.returncode, requeued(stage)) == (0, ["scontrol requeue 77"])


def test_but_not_for_ever(stage):
    done = job(stage, *TRAIN, status="preempted", SLURM_RESTART_COUNT="20")
    assert (done.returncode, requeued(stage)) == (1, [])
    assert "put back 20 times already" in done.stdout


@pytest.mark.parametrize("code", [1, 2])
def test_what_failed_is_not_put_back(stage, code):
    stage.set("train", f"exit {code}")
    done = job(stage, *TRAIN, status="preempted")
    assert (done.returncode, requeued(stage)) == (code, [])


def test_a_signal_to_the_shell_too_does_not_end_it(stage):
    stage.set("train", "kill -TERM $(ps -o ppid= -p $PPID); /bin/sleep 0.3")  # srun's parent
    done = job(stage, *TRAIN, status="preempted")
    assert "asked to leave" in done.stdout
    assert (done.returncode, requeued(stage)) == (0, ["scontrol requeue 77"])


@pytest.mark.parametrize(
    ("words", "environment", "told"),
    [
        (TRAIN, {"SLURM_JOB_ID": ""}, "this is a job: sbatch launch/slurm.sbatch"),
        (TRAIN[:2], {}, "give --workdir FOLDER"),
        (TRAIN[2:], {}, "give --config FILE"),
        (TRAIN, {"JAXLORA_PYTHON": "/none"}, "/none: there is no such Python"),
    ],
)
def test_bad_input_is_one_line(stage, words, environment, told):
    done = job(stage, *words, **environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert told in done.stderr
    assert stage.calls() == []
