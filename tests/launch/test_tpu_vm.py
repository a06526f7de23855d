"""launch/tpu_vm.sh: what it calls gcloud with, and what its remote commands do on the workers."""

import shlex
import tarfile

import pytest

from tests.launch.stage import Stage

SCRIPT = "tpu_vm.sh"
VM = "--name jl --zone us-west4-a --project P --type v5litepod-8".split()
TRAIN = ["--", "--config", "configs/qwen7b.py", '--config.journal.hypothesis=it\'s $HOME, "twice" the rank']
WHERE = ["--zone=us-west4-a", "--project=P"]


def single(stage: Stage) -> list[str]:
    return [*VM, "--data-disk", "runs", "--mount", f"{stage.folder}/share", "--workdir", "runs/one"]


def pod(stage: Stage) -> list[str]:
    type_and_share = ["--type", "v5litepod-16", "--nfs", "10.0.0.2:/jl", "--mount", f"{stage.folder}/share"]
    return [*VM[:-2], *type_and_share, "--workdir", "runs/one"]


def gcloud(stage: Stage) -> list[list[str]]:
    """The calls without `gcloud compute tpus` and without where."""
    for call in stage.calls("gcloud"):
        assert call.arguments[:2] == ("compute", "tpus")
        assert [word for word in call.arguments if word in WHERE] == WHERE
    return [[word for word in call.arguments[2:] if word not in WHERE] for call in stage.calls("gcloud")]


def steps(stage: Stage) -> list[str]:
    """The calls in short: what of what, or tpu_worker.sh's command."""
    told = []
    for words in gcloud(stage):
        command = words[-1].partition("tpu_worker.sh ")[2] if words[1] == "ssh" else ""
        told.append(f"work {command.split()[0]}" if command else " ".join(words[:2]))
    return told


GONE = "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: no such node\n"
RESUMED = [
    *("tpu-vm delete", "tpu-vm create", "tpu-vm ssh", "tpu-vm scp", "tpu-vm ssh", "work install", "work run"),
]

# ---- create -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type", "runtime", "topology"),
    [
        ("v5litepod-8", "v2-alpha-tpuv5-lite", "v5e:2x4"),
        ("v5litepod-1", "v2-alpha-tpuv5-lite", "v5e:1x1"),
        ("v6e-8", "v2-alpha-tpuv6e", "v6e:2x4"),
        ("v5p-8", "v2-alpha-tpuv5", "v5p:2x2x1"),
        ("v4-8", "tpu-ubuntu2204-base", "v4:2x2x1"),
    ],
)
def test_a_type_has_its_runtime_and_is_told_to_the_plan(stage, type, runtime, topology):
    done = stage.run(SCRIPT, "create", *VM[:-1], type, "--scratch", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert gcloud(stage) == [["tpu-vm", "create", "jl", f"--accelerator-type={type}", f"--version={runtime}"]]
    assert f"python -m jaxlora.plan --config configs/qwen7b.py --topology {topology}\n" in done.stderr


def test_a_spot_vm_with_a_disk(stage):
    assert stage.run(SCRIPT, "create", *VM, "--spot", "--data-disk=runs", "--network=vpc").returncode == 0
    disk = "--data-disk=source=projects/P/zones/us-west4-a/disks/runs,mode=read-write"
    asked = ["--accelerator-type=v5litepod-8", "--spot", disk, "--network=vpc"]
    assert gcloud(stage) == [["tpu-vm", "create", "jl", *asked, "--version=v2-alpha-tpuv5-lite"]]


def test_a_queued_request_is_waited_for(stage):
    stage.set("queued-resources-states", "WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    done = stage.run(SCRIPT, "create", *VM, "--queued", "--spot", "--scratch")
    assert done.returncode == 0
    create, *describes = gcloud(stage)
    asked = ["--accelerator-type=v5litepod-8", "--spot", "--runtime-version=v2-alpha-tpuv5-lite"]
    assert create == ["queued-resources", "create", "jl", "--node-id=jl", *asked]
    assert describes == [["queued-resources", "describe", "jl", "--format=value(state.state)"]] * 3
    assert "WAITING_FOR_RESOURCES for 0 min" in done.stderr


def test_a_request_that_failed_ends_it(stage):
    stage.set("queued-resources-states", "WAITING_FOR_RESOURCES\nFAILED\n")
    done = stage.run(SCRIPT, "create", *VM, "--queued", "--scratch")
    assert done.returncode == 1
    assert "the request is FAILED" in done.stderr


# ---- install, run, log --------------------------------------------------------------------------------------------


def test_one_host_from_nothing_to_its_log(stage):
    """The remote commands are real: bash does them, in the worker's home."""
    stage.set("python-unfit", "1")  # Ubuntu 22.04 has 3.10
    for step in ("create", "install", "run"):
        done = stage.run(SCRIPT, step, *single(stage), *TRAIN)
        assert done.returncode == 0, done.stderr
    home, share = stage.folder / "worker-0", stage.folder / "share"
    log = stage.wait_for(share / "runs/one.log", "exit code 0")
    python = f"{home}/jaxlora-venv/bin/python"
    (uv,) = stage.calls("uv")
    assert uv.line == f"uv venv --clear --seed --python 3.12 {home}/jaxlora-venv"
    assert [call.line for call in stage.calls("sudo")] == [
        "sudo blkid -o value -s TYPE /dev/sdb",
        f"sudo mkdir -p {share}",
        f"sudo mount -o discard,defaults /dev/sdb {share}",
        f"sudo chmod 1777 {share}",
    ]
    pip = [call.arguments for call in stage.calls("python") if "install" in call.arguments]
    assert [words[-3:] for words in pip] == [("-r", f"{home}/jaxlora/requirements.txt", "jax[tpu]")]
    (training,) = stage.trainings()
    assert training.arguments == ("-m", "jaxlora.train", *TRAIN[1:], "--workdir", f"{share}/runs/one")
    assert (training.folder, training.hf_home) == (f"{home}/jaxlora", f"{share}/huggingface")
    assert f"{python} -m jaxlora.train" in log
    assert "trained\n" in log

    stage.forget()
    shown = stage.run(SCRIPT, "log", *single(stage))
    assert gcloud(stage)[0][:4] == ["tpu-vm", "ssh", "jl", "--worker=0"]
    assert shown.stdout == log
    assert "not running" in shown.stderr


def test_the_log_is_followed_until_the_run_ends(stage):
    stage.set(
        "train", f"echo began; until [[ -e {stage.folder}/enough ]]; do /bin/sleep 0.05; done; echo ended"
    )
    for step in ("install", "run"):
        stage.run(SCRIPT, step, *single(stage), *TRAIN)
    with stage.start(SCRIPT, "log", *single(stage)) as reader:
        assert "ended\n" not in stage.wait_for(stage.output, "began\n")
        (stage.folder / "enough").touch()
    assert reader.returncode == 0
    assert "ended\n" in stage.output.read_text()


def test_all_workers_of_a_pod_run_it_and_have_logs_of_their_own(stage):
    stage.set("workers", "0 1")
    for step in ("install", "run"):
        done = stage.run(SCRIPT, step, *pod(stage), *TRAIN)
        assert done.returncode == 0, done.stderr
    share = stage.folder / "share"
    for log in ("one.log", "one.worker-1.log"):
        stage.wait_for(share / "runs" / log, "exit code 0")
    homes = [str(stage.folder / f"worker-{number}") for number in (0, 1)]
    assert sorted(call.home for call in stage.trainings()) == homes
    assert {call.arguments for call in stage.trainings()} == {
        ("-m", "jaxlora.train", *TRAIN[1:], "--workdir", f"{share}/runs/one")
    }
    assert (share / "runs/one.log").stat().st_mode & 0o777 == 0o666  # the workers' user ids may differ
    mounts = [call for call in stage.calls("sudo") if call.arguments[0] == "mount"]
    assert [(call.home, call.arguments[1:]) for call in mounts] == [
        (home, ("-t", "nfs", "-o", "hard", "10.0.0.2:/jl", str(share))) for home in homes
    ]
    assert all("--worker=all" in words for words in gcloud(stage))


def test_a_worker_of_a_pod_comes_back_after_the_others_have_stopped(stage):
    stage.run(SCRIPT, "install", *pod(stage))
    stage.set("train", 'echo x >>"$STAGE/trained"; (($(wc -l <"$STAGE/trained") > 1)) || exit 1')
    stage.run(SCRIPT, "run", *pod(stage), *TRAIN)
    log = stage.wait_for(stage.folder / "share/runs/one.log", "exit code 0")
    assert "exit code 1\n== again in 90 s" in log  # --lost-after is 60


def test_a_new_vm_refuses_connections_for_a_while(stage):
    stage.set("refused", "1\n2\n")
    done = stage.run(SCRIPT, "install", *single(stage))
    assert done.returncode == 0
    assert steps(stage) == ["tpu-vm ssh"] * 3 + ["tpu-vm scp", "tpu-vm ssh", "work install"]


def test_a_vm_that_never_answers_is_given_up(stage):
    stage.set("refused", "no\n" * 50)
    done = stage.run(SCRIPT, "install", *single(stage))
    assert done.returncode == 1
    assert len(gcloud(stage)) == 10


def test_the_checkout_is_copied_and_not_its_runs(stage):
    for name in (
        "jaxlora/runs/directory.py",
        "runs/old/config.json",
        ".git/HEAD",
        ".venv/bin/python",
        "mine.jsonl",
    ):
        file = stage.checkout / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    stage.run(SCRIPT, "install", *single(stage))
    with tarfile.open(stage.folder / "worker-0/jaxlora.tgz") as archive:
        names = set(archive.getnames())
    assert {"./jaxlora/runs/directory.py", "./mine.jsonl", "./launch/machine.sh"} <= names
    assert not [name for name in names if name.startswith(("./runs", "./.git", "./.venv"))]


def test_a_disk_is_formatted_only_when_asked(stage):
    stage.set("file-system", "")
    done = stage.run(SCRIPT, "install", *single(stage))
    assert done.returncode == 2
    assert "/dev/sdb has no file system. If the disk is new, add --format" in done.stderr
    assert not [call for call in stage.calls("sudo") if "mkfs.ext4" in call.arguments]
    assert stage.run(SCRIPT, "install", *single(stage), "--format").returncode == 0
    stage.forget()
    (stage.folder / "worker-0/mounted").unlink()
    assert stage.run(SCRIPT, "install", *single(stage), "--format").returncode == 0  # it has one now
    assert not [call for call in stage.calls("sudo") if "mkfs.ext4" in call.arguments]


def test_a_run_is_not_started_twice_nor_after_its_end(stage):
    stage.set("train", f"until [[ -e {stage.folder}/enough ]]; do /bin/sleep 0.05; done")
    stage.run(SCRIPT, "install", *single(stage))
    for _ in range(2):
        done = stage.run(SCRIPT, "run", *single(stage), *TRAIN)
    assert "already running" in done.stderr
    assert "running (process" in stage.run(SCRIPT, "status", *single(stage)).stdout
    (stage.folder / "enough").touch()
    stage.wait_for(stage.folder / "share/runs/one.log", "exit code 0")
    assert len(stage.trainings()) == 1
    run = stage.folder / "share/runs/one"
    run.mkdir()
    (run / "record.json").write_text('{\n  "status": "finished",\n  "steps": 3\n}')
    done = stage.run(SCRIPT, "run", *single(stage), *TRAIN)
    assert "this run has ended (finished)" in done.stderr
    assert len(stage.trainings()) == 1


def test_stop_lets_it_save(stage):
    stage.set("train", "trap 'echo saved; exit 0' TERM; echo began; while :; do /bin/sleep 0.05; done")
    stage.run(SCRIPT, "install", *single(stage))
    stage.run(SCRIPT, "run", *single(stage), *TRAIN)
    stage.wait_for(stage.folder / "share/runs/one.log", "began")
    assert stage.run(SCRIPT, "stop", *single(stage)).returncode == 0
    assert "saved\n" in stage.wait_for(stage.folder / "share/runs/one.log", "exit code 0")


# ---- resume -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_a_preempted_vm_is_made_anew_and_the_same_command_run(stage, state):
    for step in ("install", "run"):
        stage.run(SCRIPT, step, *single(stage), *TRAIN)
    stage.wait_for(stage.folder / "share/runs/one.log", "exit code 0")
    (before,) = stage.trainings()
    stage.forget()
    stage.set("tpu-vm-states", f"{state}\n")
    done = stage.run(SCRIPT, "resume", *single(stage), *TRAIN)
    assert done.returncode == 0, done.stderr
    assert steps(stage) == ["tpu-vm describe", *RESUMED]
    stage.wait_for(stage.folder / "share/runs/one.log", "exit code 0", times=2)
    assert [call.arguments for call in stage.trainings()] == [before.arguments]


def test_a_preempted_queued_vm_goes_with_its_request(stage):
    stage.set("tpu-vm-states", "PREEMPTED\n")
    done = stage.run(SCRIPT, "resume", *single(stage), "--queued", "--spot", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert ["queued-resources", "delete", "jl", "--force", "--quiet"] in gcloud(stage)
    queue = [f"queued-resources {step}" for step in ("delete", "create", "describe")]
    assert steps(stage)[:4] == ["tpu-vm describe", *queue]


def test_a_vm_that_is_there_only_runs(stage):
    stage.run(SCRIPT, "install", *single(stage))
    stage.forget()
    assert stage.run(SCRIPT, "resume", *single(stage), *TRAIN).returncode == 0
    assert steps(stage) == ["tpu-vm describe", "tpu-vm ssh", "work run"]
    stage.wait_for(stage.folder / "share/runs/one.log", "exit code 0")


def test_a_vm_that_is_there_and_bare_is_installed(stage):
    """Somebody's laptop was closed after create."""
    assert stage.run(SCRIPT, "resume", *single(stage), *TRAIN).returncode == 0
    assert steps(stage) == ["tpu-vm describe", "tpu-vm ssh", *RESUMED[2:]]
    stage.wait_for(stage.folder / "share/runs/one.log", "exit code 0")


def test_a_vm_that_is_gone_is_made(stage):
    stage.set("tpu-vm-states", GONE)
    assert stage.run(SCRIPT, "resume", *single(stage), *TRAIN).returncode == 0
    assert steps(stage) == ["tpu-vm describe", *RESUMED[1:]]
    stage.wait_for(stage.folder / "share/runs/one.log", "exit code 0")


@pytest.mark.parametrize(
    ("request_states", "between"),
    [
        (f"{GONE}ACTIVE\n", "describe create describe"),
        ("SUSPENDED\nACTIVE\n", "describe delete create describe"),
        ("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n", "describe describe describe"),  # it keeps its place
    ],
)
def test_what_is_left_of_a_queued_request(stage, request_states, between):
    stage.set("tpu-vm-states", GONE)
    stage.set("queued-resources-states", request_states)
    done = stage.run(SCRIPT, "resume", *single(stage), "--queued", *TRAIN)
    assert done.returncode == 0, done.stderr
    queue = [f"queued-resources {step}" for step in between.split()]
    assert steps(stage) == ["tpu-vm describe", *queue, *RESUMED[2:]]
    stage.wait_for(stage.folder / "share/runs/one.log", "exit code 0")


@pytest.mark.parametrize("answer", ["CREATING", "STOPPED", "ERROR: (gcloud) there is no active account"])
def test_otherwise_nothing_is_deleted(stage, answer):
    stage.set("tpu-vm-states", f"{answer}\n")
    done = stage.run(SCRIPT, "resume", *single(stage), *TRAIN)
    assert done.returncode == 1
    assert answer in done.stderr
    assert steps(stage) == ["tpu-vm describe"]


def test_delete(stage):
    stage.run(SCRIPT, "delete", *VM)
    stage.run(SCRIPT, "delete", *VM, "--queued")
    assert gcloud(stage) == [
        ["tpu-vm", "delete", "jl", "--quiet"],
        ["queued-resources", "delete", "jl", "--force", "--quiet"],
    ]


# ---- dry runs and bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "options"),
    [
        *((step, single) for step in "create install run log status stop resume delete".split()),
        ("create", pod),
        ("resume", pod),
    ],
)
def test_a_dry_run_calls_nothing_and_prints_what_a_run_calls(stage, step, options):
    words = [step, *options(stage), *(TRAIN if step in ("run", "resume", "create") else [])]
    told = stage.run(SCRIPT, step, "--dry-run", *words[1:])
    assert told.returncode == 0, told.stderr
    assert stage.calls() == []
    printed = [shlex.split(line) for line in told.stdout.splitlines()]

    stage.set("tpu-vm-states", "PREEMPTED\n" if step == "resume" else "READY\n")
    stage.set("train", "exit 0")
    stage.run(SCRIPT, *words)
    called = [list(call.arguments) for call in stage.calls("gcloud")]
    for words in called:
        if words[3] == "scp":
            words[4] = "jaxlora.tgz"  # of a temporary folder
    assert [words[1:] for words in printed if words[0] == "gcloud"] == called


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("creat", "there is no command 'creat'; there are create, install,"),
        ("create --nam x", "there is no option '--nam'"),
        ("create --name", "--name needs a value"),
        ("create --name Upper --zone us-west4-a", "--name 'Upper': give lower-case letters"),
        ("create --name x --zone west", "--zone 'west': give a zone, for example"),
        ("create VM --type v5e-8", "--type 'v5e-8': there is no such type; give v5litepod-N"),
        ("create VM --type v5litepod-7", "sizes are 1 4 8 16 32 64 128 256"),
        ("create VM --type v4-4", "sizes are 8 16 32"),
        ("create VM --type v4-8", "the run's folder would die with the VM: give --data-disk"),
        ("create VM --type v4-16 --data-disk d --project p", "give --nfs HOST:/SHARE instead of --data-disk"),
        ("create VM --type v4-8 --data-disk d", "--data-disk d needs --project"),
        ("create VM --type v4-8 --nfs share", "--nfs 'share': give HOST:/SHARE"),
        ("run VM --type v4-8 --scratch", "--workdir '': give the run's folder"),
        ("run VM --type v4-8 --scratch --workdir ../x", "--workdir '../x': give"),
        ("run VM --type v4-8 --scratch --workdir runs/x", "nothing to train: give -- --config FILE"),
        (
            "run VM --type v4-8 --scratch --workdir r -- --config c --workdir r",
            "give --workdir before the --",
        ),
        ("run VM --type v4-8 --scratch --restarts many --workdir r", "--restarts is 'many'"),
        ("log VM --workdir r", "say where the run's folder lies"),
    ],
)
def test_bad_input_is_one_line(stage, words, told):
    done = stage.run(SCRIPT, *words.replace("VM", "--name x --zone us-west4-a").split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("tpu_vm.sh: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert stage.calls() == []
