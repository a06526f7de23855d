"""launch/skypilot.yaml: what SkyPilot's schema wants, and setup and run done by bash."""

import re

import pytest
import yaml

from tests.launch.stage import LAUNCH

# Of SkyPilot 0.14's sky/utils/schemas.py, which allows no other: what a task, its resources and a mount may have.
TASK = set("name workdir num_nodes resources file_mounts setup run envs secrets config volumes".split())
RESOURCES = set(
    "infra accelerators accelerator_args cpus memory instance_type use_spot job_recovery any_of ordered".split()
)
ARGUMENTS = set("runtime_version tpu_name tpu_vm gcp_queued_resource".split())
RECOVERY = set("strategy max_restarts_on_errors recover_on_exit_codes".split())
STORAGE = set("name source store persistent mode mount_options type config".split())


@pytest.fixture(scope="module")
def task() -> dict:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_it_has_what_the_schema_allows(task):
    assert set(task) <= TASK
    resources = task["resources"]
    assert set(resources) <= RESOURCES
    assert set(resources["job_recovery"]) <= RECOVERY
    assert resources["use_spot"] is True
    for choice in resources["any_of"]:
        assert set(choice) <= RESOURCES - {"any_of", "ordered"}
        assert set(choice.get("accelerator_args", {})) <= ARGUMENTS
        assert isinstance(choice["accelerators"], str)
    assert all(value is None or isinstance(value, str) for value in task["envs"].values())
    for mount in task["file_mounts"].values():
        assert set(mount) <= STORAGE
        assert mount["mode"] == "MOUNT_CACHED"  # files are appended to and renamed


def test_tpus_have_the_runtimes_that_tpu_vm_sh_gives_them(task):
    versions = dict(re.findall(r"^ +(\w+)\) .*version=(\S+) ;;", (LAUNCH / "tpu_vm.sh").read_text(), re.M))
    choices = task["resources"]["any_of"]
    tpus = [choice for choice in choices if choice["accelerators"].startswith("tpu-")]
    assert [choice["accelerators"] for choice in tpus] == ["tpu-v5litepod-8", "tpu-v6e-8"]
    for choice in tpus:
        kind = choice["accelerators"].split("-")[1]
        assert choice["accelerator_args"]["runtime_version"] == versions[kind]


def test_the_command_in_its_comment_sets_the_variables_that_it_has(task):
    text = (LAUNCH / "skypilot.yaml").read_text()
    assert set(re.findall(r"--env (\w+)=", text)) == set(task["envs"])


@pytest.mark.parametrize(("driver", "extra"), [("580.95.05\n", "cuda13"), ("", "tpu")])
def test_setup_and_run_are_bash_and_train(stage, task, driver, extra):
    stage.set("driver", driver)
    (stage.bin / "nvidia-smi").write_text("#!/bin/bash\n[[ -s $STAGE/driver ]]\n")
    setup = stage.run("/bin/bash", "-c", task["setup"])
    assert setup.returncode == 0, setup.stderr
    run = stage.run("/bin/bash", "-c", task["run"], CONFIG="configs/my own.py", RUN="one")
    assert run.returncode == 0, run.stderr
    (pip,) = [call.arguments for call in stage.calls("python") if "install" in call.arguments]
    assert pip[-3:] == ("-r", "requirements.txt", f"jax[{extra}]")
    (training,) = stage.trainings()
    assert training.arguments[2:] == ("--config", "configs/my own.py", "--workdir", "/runs/one")


def test_a_run_that_fails_fails_the_job(stage, task):
    stage.run("/bin/bash", "-c", task["setup"])
    stage.set("train", "exit 2")
    assert stage.run("/bin/bash", "-c", task["run"], CONFIG="c", RUN="r").returncode == 2
