"""A stage for the scripts of launch/: stand-ins for what they call, first in PATH, that note their calls.

Nothing outside the stage is touched: HOME is a folder of its own, and what would need root, a network or an
accelerator is a stand-in. gcloud's plays a Cloud TPU: `create`, `delete` and `describe` agree on a state, and what
`ssh` and `scp` are given is done, by bash, in a home of each worker's own.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LAUNCH = Path(__file__).resolve().parents[2] / "launch"

NOTE = r"""#!/bin/bash
printf '%s\0' "${0##*/}" "$HOME" "$PWD" "${HF_HOME-}" "$@" "$(printf '\036')" >>"$STAGE/calls"  # one write
"""

SYSTEM_PYTHON = """
case $1 in
    -c) exit "$(cat "$STAGE/python-unfit")" ;;  # whether it is of a fitting version
    -m) mkdir -p "${@: -1}/bin" && cp "$STAGE/python" "${@: -1}/bin/python" ;;  # -m venv FOLDER
esac
"""

# What is in a virtual environment: trains as $STAGE/train says, a piece of bash that reads its arguments.
PYTHON = """
if [[ $* == "-m jaxlora.train "* ]]; then source "$STAGE/train"; fi
"""

GCLOUD = r"""
command="" which=0
for word in "$@"; do
    case $word in
        --command=*) command=${word#*=} ;;
        --worker=*) which=${word#*=} ;;
    esac
done
workers=$(cat "$STAGE/workers")
if [[ $which == 0 ]]; then workers=0; fi
case "$3 $4" in
    "queued-resources describe" | "tpu-vm describe")
        states=$STAGE/$3-states
        line=$(head -n 1 "$states")
        # The last state lasts.
        if (($(wc -l <"$states") > 1)); then sed -i 1d "$states"; fi
        case $line in
            *NOT_FOUND* | ERROR*) echo "$line" >&2; exit 1 ;;
        esac
        echo "$line" ;;
    "tpu-vm create" | "queued-resources create") echo READY >"$STAGE/tpu-vm-states" ;;
    "tpu-vm delete" | "queued-resources delete")
        echo "ERROR: (gcloud) NOT_FOUND: no such node" >"$STAGE/tpu-vm-states"
        rm -rf "$STAGE"/worker-* ;;
    "tpu-vm scp")
        for worker in $workers; do mkdir -p "$STAGE/worker-$worker" && cp "$5" "$STAGE/worker-$worker/${6#*:}"; done ;;
    "tpu-vm ssh")
        if [[ -s $STAGE/refused ]]; then sed -i 1d "$STAGE/refused"; exit 255; fi
        for worker in $workers; do
            mkdir -p "$STAGE/worker-$worker" && cd "$STAGE/worker-$worker" &&
                HOME=$PWD WORKER=$worker bash -c "$command" || exit
        done ;;
esac
"""

BODIES = {
    "gcloud": GCLOUD,
    "curl": r"""
case "$*" in
    *agent-worker-number) printf %s "$WORKER" ;;
    *astral.sh*) echo 'mkdir -p ~/.local/bin && cp "$STAGE/uv" ~/.local/bin/uv' ;;
    *) exit 6 ;;
esac
""",
    "sudo": r"""
case $1 in
    blkid) cat "$STAGE/file-system" ;;
    mkfs.ext4) echo ext4 >"$STAGE/file-system" ;;
    mount) touch "$HOME/mounted" ;;
    chmod) mkdir -p "${@: -1}" ;;
esac
""",
    "mountpoint": "[[ -e $HOME/mounted ]]",
    # As on a TPU VM: a boot disk with partitions, and a disk beside it.
    "lsblk": r"""
case "$*" in
    "-dprno NAME,TYPE") printf '/dev/loop0 loop\n/dev/sda disk\n/dev/sdb disk\n' ;;
    *" /dev/sda") printf 'sda\nsda1\nsda14\n' ;;
    *" /dev/sdb") printf 'sdb\n' ;;
esac
""",
    "nvidia-smi": 'cat "$STAGE/driver" 2>/dev/null',
    "crontab": r"""
case $1 in
    -l) cat "$STAGE/crontab" 2>/dev/null ;;
    -) cat >"$STAGE/crontab.new" && mv "$STAGE/crontab.new" "$STAGE/crontab" ;;
esac
""",
    # Two tasks, as srun starts them.
    "srun": r"""
[[ $1 == --gpu-bind=none ]] || exit 9
shift
SLURM_PROCID=0 "$@" & SLURM_PROCID=1 "$@" & wait -n; code=$?; wait; exit $code
""",
    "scontrol": "",
    "sleep": "",
    "python3": SYSTEM_PYTHON,
    "python3.11": "exit 127",
    "python3.12": "exit 127",
    "python3.13": "exit 127",
}


class Call(NamedTuple):
    """One call of a stand-in: its name and arguments, and the HOME, folder and HF_HOME that it was called with."""

    name: str
    home: str
    folder: str
    hf_home: str
    arguments: tuple[str, ...]

    @property
    def line(self) -> str:
        return shlex.join([self.name, *self.arguments])


class Stage:
    """The stand-ins and what they noted; `folder` holds the files that say how they behave.

    `run` and `start` take a script's name first, or the path of anything else.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.bin.mkdir()
        self.home.mkdir()
        self.checkout = folder / "checkout"  # a small one, since it is packed and unpacked often
        shutil.copytree(LAUNCH, self.checkout / "launch")
        (self.checkout / "requirements.txt").touch()
        for name, body in BODIES.items():
            self._write(self.bin / name, body)
        self._write(folder / "python", PYTHON)
        self._write(folder / "uv", 'mkdir -p "${@: -1}/bin" && cp "$STAGE/python" "${@: -1}/bin/python"\n')
        self.set("workers", "0")
        self.set("python-unfit", "0")
        self.set("file-system", "ext4\n")
        self.set("driver", "580.95.05\n")
        self.set("train", "echo trained")
        self.set("tpu-vm-states", "READY\n")
        self.set("queued-resources-states", "ACTIVE\n")

    def set(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def run(self, *words: str | Path, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self._command(words),
            env=self.environment(**more),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @contextlib.contextmanager
    def start(self, *words: str | Path) -> "Iterator[subprocess.Popen[bytes]]":
        """What prints into the file `output` of the stage, and is ended at the latest with the block."""
        with open(self.output, "wb") as output:
            process = subprocess.Popen(
                self._command(words),
                env=self.environment(),
                cwd=self.home,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
            process.wait(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def end(self) -> None:
        """Ends what a failed test has left running in the background: the leaders of sessions in the .pid files."""
        for file in self.folder.rglob("*.pid"):
            command = Path(f"/proc/{file.read_text().strip()}/cmdline")
            with contextlib.suppress(OSError):  # it may end by itself at any of these
                if str(self.folder) in command.read_text():
                    os.killpg(int(file.read_text()), signal.SIGKILL)

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def _command(self, words: tuple[str | Path, ...]) -> list[str]:
        return [str(self.checkout / "launch" / words[0]), *map(str, words[1:])]

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "STAGE": str(self.folder),
            "HOME": str(self.home),
            "PATH": f"{self.bin}:/usr/bin:/bin",
            **more,
        }

    def calls(self, *names: str) -> list[Call]:
        """What was called since the last `forget`, in order; of these names, or of all."""
        file = self.folder / "calls"
        told = file.read_text().split("\036\0")[:-1] if file.exists() else []
        found = [call.split("\0")[:-1] for call in told]
        calls = [Call(name, home, cwd, hf, tuple(words)) for name, home, cwd, hf, *words in found]
        return [call for call in calls if not names or call.name in names]

    def trainings(self) -> list[Call]:
        return [call for call in self.calls("python") if call.arguments[:2] == ("-m", "jaxlora.train")]

    def forget(self) -> None:
        (self.folder / "calls").unlink(missing_ok=True)

    @staticmethod
    def wait_for(file: Path, text: str, times: int = 1) -> str:
        """The file's text, once it holds `text` that often: what runs in the background takes its time."""
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            if file.exists() and file.read_text().count(text) >= times:
                return file.read_text()
            time.sleep(0.025)
        raise AssertionError(
            f"{file} does not hold {text!r}: {file.read_text() if file.exists() else 'none'}"
        )

    @staticmethod
    def _write(file: Path, body: str) -> None:
        file.write_text(NOTE + body)
        os.chmod(file, 0o755)
