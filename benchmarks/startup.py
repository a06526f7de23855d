"""Seconds from the command to the first step, and to a command's --help.

    python -m benchmarks.startup                     # Qwen2.5-0.5B's shape, a gigabyte on disk for a while

A model folder with random bfloat16 weights and the quickstart's tokenizer and data is written, and
`python -m jaxlora.train` is run on it for three steps of 4 x 256 tokens, until metrics.jsonl has its first line. Cold:
with an empty compilation cache and empty caches of data, in a folder of their own. Warm: the same once more, into
another run. The weights have just been written, so they come from the machine's memory, not from its disk.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks import commands, report, timing
from benchmarks.loading import write_model
from benchmarks.shapes import SHAPES
from benchmarks.train_vs_peft import QUICKSTART
from jaxlora.runs.progress import Progress

COMMANDS = ("train", "sweep", "evaluate", "generate", "export", "plan", "journal")


def first_step(model: Path, folder: Path, caches: Path, arguments: Namespace) -> dict[str, float]:
    """Starts a run of three steps; seconds until its first step was written down, and until its end."""
    settings = {
        "model.path": model, "model.remat": "full",
        "data.max_length": arguments.length,
        "train.batch_size": arguments.rows, "train.micro_batch_size": arguments.rows, "train.max_steps": 3,
        "optim.warmup_steps": 1, "eval.every": 3, "eval.generate": 0, "eval.max_examples": arguments.rows,
        "eval.batch_size": arguments.rows, "eval.train_examples": 0, "checkpoint.every": 3, "log.every": 1,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "jaxlora.train", "--config", str(QUICKSTART.parent / "quickstart.py"),
        "--workdir", str(folder), *(f"--config.{key}={value}" for key, value in settings.items()),
    ]  # fmt: skip
    environment = os.environ | {
        "XDG_CACHE_HOME": str(caches), "JAX_COMPILATION_CACHE_DIR": str(caches / "xla"), "HF_HOME": str(caches / "hf"),
    }  # fmt: skip
    log, metrics = folder.with_suffix(".log"), folder / "metrics.jsonl"
    found: dict[str, float] = {}
    with log.open("w") as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if "first_step" not in found and metrics.exists() and '"train/nll"' in metrics.read_text():
                    found["first_step"] = time.perf_counter() - began
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
    found["end"] = time.perf_counter() - began
    if process.returncode or "first_step" not in found:
        last = "\n".join(log.read_text().splitlines()[-5:])
        raise SystemExit(f"the run ended with code {process.returncode}:\n{last}")
    return found


def runs(arguments: Namespace, progress: Progress) -> dict[str, list[dict[str, float]]]:
    """Each round: a cold start and a warm one."""
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        model.mkdir()
        write_model(model, SHAPES[arguments.shape], progress)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(QUICKSTART / "base" / name, model)
        for turn in range(arguments.rounds):
            caches = Path(place) / f"caches{turn}"
            for name, taken in found.items():
                with progress.stage(f"round {turn + 1} of {arguments.rounds}, {name}"):
                    taken.append(first_step(model, Path(place) / f"run{turn}-{name}", caches, arguments))
            shutil.rmtree(caches)
    return found


def helps(rounds: int) -> dict[str, list[float]]:
    """Seconds of each command's --help; the first round, which fills the disk's cache, is not counted."""

    def ask(command: str) -> None:
        subprocess.run(
            [sys.executable, "-m", f"jaxlora.{command}", "--help"], stdout=subprocess.DEVNULL, check=True
        )

    return timing.in_turn({name: lambda name=name: ask(name) for name in COMMANDS}, rounds)


def main() -> None:
    parser = commands.parser(__doc__, rounds=3)
    parser.add_argument("--shape", choices=SHAPES, default="0.5B")
    parser.add_argument("--rows", type=commands.positive, default=4, help="in a step (4)")
    parser.add_argument("--length", type=commands.positive, default=256, help="of a row (256)")
    parser.add_argument(
        "--only", type=commands.choices(("train", "help")), default=["train", "help"], help="one of both"
    )
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.shape, arguments.rows = "toy", 8  # rows that up to eight devices can share
    told = report.Report("startup", arguments)
    results: dict[str, Any] = {}
    if "train" in arguments.only:
        with Progress(output=sys.stderr) as progress:
            taken = runs(arguments, progress)
        for name, each in taken.items():
            results[name] = {key: timing.spread(one[key] for one in each) for key in ("first_step", "end")}
        print(f"{arguments.shape}, {arguments.rows} x {arguments.length}")
        report.table(
            ("seconds", "to the first step", "to the end of three"),
            [
                (name, timing.shown(one["first_step"], 1), timing.shown(one["end"], 1))
                for name, one in results.items()
            ],
        )
    if "help" in arguments.only:
        results["help"] = {name: timing.spread(seconds) for name, seconds in helps(arguments.rounds).items()}
        report.table(
            ("seconds", "--help"), [(name, timing.shown(one)) for name, one in results["help"].items()]
        )
    told.write(
        report.device(),
        ("jax", "jaxlib", "flax", "orbax-checkpoint"),
        results,
        shape=arguments.shape,
    )


if __name__ == "__main__":
    main()
