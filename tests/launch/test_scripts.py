"""What holds for all of launch/, and for the commands that are told of it."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlora.config.load import load_config
from tests.launch.stage import LAUNCH

SHELL = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", LAUNCH.parent / ".ci/run"])
FILES = sorted([*LAUNCH.iterdir(), LAUNCH.parent / "docs/launch.md"])


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or "shellcheck"
    done = subprocess.run([program, "-x", *SHELL], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize(
    "script", [path for path in SHELL if path.name not in ("lib.sh", "machine.sh")], ids=lambda p: p.name
)
def test_scripts_can_be_run_and_stop_at_the_first_error(script):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_worker.sh", "gpu.sh"])
def test_help_names_every_option_and_command(stage, script):
    done = stage.run(script, "--help")
    assert (done.returncode, done.stderr, stage.calls()) == (0, "", [])
    text = (LAUNCH / script).read_text().split("# ---- the command line")[1]
    options = set(re.findall(r"--[a-z][a-z-]+", "\n".join(re.findall(r"^ {8}(--[^)]*)\)", text, re.M)))) - {
        "--again"
    }
    commands = re.search(r"there are (.*)\"", text)
    assert commands
    missing = {
        word
        for word in {*options, *commands[1].split(", ")}
        if not re.search(rf"(?<![\w-]){word}(?![\w-])", done.stdout)
    }
    assert not missing


@pytest.mark.parametrize(
    "words",
    [
        ["plain", "a/b.c:d=e,f@g%h+i-j"],
        ["", " ", "two words", "it's", '"', "\\", "$HOME", "`x`", "*", "a\nb", "&", "!", "~", "#", "''", "é"],
    ],
)
def test_what_is_printed_can_be_pasted(stage, words):
    done = stage.run("/bin/bash", "-c", f'source {LAUNCH}/lib.sh; quoted "$@"', "_", *words)
    assert shlex.split(done.stdout) == words
    again = stage.run("/bin/bash", "-c", f"printf '%s\\0' {done.stdout}")
    assert again.stdout.split("\0")[:-1] == words


def told_commands(beginning: str) -> list[tuple[str, str]]:
    """(file, command) for each line in a comment, or in a block of the docs, that begins so."""
    return [
        (file.name, line)
        for file in FILES
        for line in re.findall(rf"^[#| ]*({beginning}.*?)(?:  +#.*)?$", file.read_text(), flags=re.M)
    ]


@pytest.mark.parametrize(("file", "command"), told_commands(r"launch/\w+\.sh [a-z]"))
def test_every_command_that_is_told_is_one(stage, file, command):
    """With --dry-run after its first word, and the shell variables of the text that it stands in."""
    variables = re.findall(
        r'\b([A-Z]+)="([^"]*)"', next(path for path in FILES if path.name == file).read_text()
    )
    for name, value in variables:
        command = command.replace(f"${name}", value)
    script, step, *words = shlex.split(command)
    assert not any(word.startswith("$") for word in words)
    done = stage.run(script.removeprefix("launch/"), step, "--dry-run", *words)
    assert done.returncode == 0, done.stderr


def test_every_plan_that_is_told_has_a_config_and_a_topology_of_the_table():
    script = (LAUNCH / "tpu_vm.sh").read_text()
    shapes = {
        shape for line in re.findall(r'local (?:flat|deep)="([^"]*)"', script) for shape in line.split()
    }
    topologies = {shape.partition(":")[2] for shape in shapes}
    plans = [
        shlex.split(line)
        for file in FILES
        for line in re.findall(
            r"python -m jaxlora\.plan (--config [^\n`#]*configs/[^\n`#\"]*)", file.read_text()
        )
    ]
    assert len(plans) >= 10
    for words in plans:
        load_config(words[1], [])
        if words[2:3] == ["--topology"]:
            kind, _, shape = words[3].partition(":")
            assert kind in ("v4", "v5e", "v5p", "v6e")
            assert shape in topologies
