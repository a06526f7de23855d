"""How long the journal of a thousand runs of 10,000 steps takes, and how much memory.

    python -m benchmarks.journal --out benchmarks/results/journal.json

The runs are invented: a grid of learning rates, ranks, warmups and seeds, each with a line of metrics.jsonl every 10
steps, an evaluation every 500 and the losses of 200 held-out examples, as a run writes them. The command then reads
all of them, compares each with its baseline and writes the log and the report, in a process of its own, several times.
Reported are wall-clock and processor seconds and the largest resident memory; the first and the last must stay below
10 seconds and 500 MB.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import write

EVERY, EVALUATE, EXAMPLES = 10, 500, 200
RATES, RANKS, WARMUPS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4), (8, 16, 64, 128), (100, 1000)


def config(number: int, steps: int) -> dict[str, Any]:
    """The config of one run of the grid, with as many keys as one has."""
    from jaxlora.config.schema import Config, to_dict

    rank = RANKS[number // len(RATES) % len(RANKS)]
    return to_dict(
        Config.from_dict(
            {
                "model": {"path": "Qwen/Qwen2.5-0.5B-Instruct"},
                "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
                "lora": {"rank": rank, "alpha": 2.0 * rank},
                "optim": {
                    "learning_rate": RATES[number % len(RATES)],
                    "warmup_steps": WARMUPS[number // len(RATES) // len(RANKS) % len(WARMUPS)],
                },
                "train": {"max_steps": steps},
                "seed": number // len(RATES) // len(RANKS) // len(WARMUPS),
            }
        )
    )


def write_run(folder: Path, number: int, steps: int) -> None:
    """One run's folder: config.json, record.json, metrics.jsonl and eval/."""
    draw = np.random.default_rng(number)
    made = config(number, steps)
    (folder / "eval").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(made, indent=2))
    logged = np.arange(EVERY, steps + 1, EVERY)
    speed = made["optim"]["learning_rate"] / 2e-4
    nll = 0.8 + 1.8 / (1 + speed * logged / 1500) + 0.03 * draw.normal(size=len(logged))
    norm = np.exp(-0.5 + 0.1 * draw.normal(size=len(logged)))
    lines = [
        f'{{"step": {step}, "train/loss": {loss!r}, "train/nll": {loss!r}, "train/token_accuracy": {1 / (1 + loss)!r}, '
        f'"train/grad_norm": {size!r}, "train/learning_rate": {made["optim"]["learning_rate"]!r}, '
        f'"train/tokens": 16384, "train/tokens_per_second": 51234.5}}'
        for step, loss, size in zip(logged.tolist(), nll.tolist(), norm.tolist(), strict=True)
    ]
    level = np.random.default_rng(0).normal(1.4, 0.5, EXAMPLES)  # some examples are harder, in every run
    evaluated = {}
    for step in range(EVALUATE, steps + 1, EVALUATE):
        values = level + 0.8 / (1 + speed * step / 1000) + 0.03 * draw.normal(size=EXAMPLES)
        evaluated[step] = float(values.mean())
        rows = [
            f'{{"example": {e}, "nll": {value!r}, "tokens": 100}}' for e, value in enumerate(values.tolist())
        ]
        (folder / f"eval/eval-{step:08d}.jsonl").write_text("\n".join(rows) + "\n")
        lines.append(
            f'{{"step": {step}, "eval/nll": {evaluated[step]!r}, '
            f'"eval/perplexity": {np.exp(evaluated[step]).item()!r}, "eval/token_accuracy": 0.6, '
            '"eval/top5_accuracy": 0.8, "eval/entropy": 1.2, "eval/ece": 0.02}'
        )
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    best = min(evaluated, key=lambda step: evaluated[step])
    record = {
        "status": "finished",
        "steps": steps,
        "started": 1_700_000_000 + 3600 * number,
        "best": {"step": best, "eval/nll": evaluated[best]},
        "data": {name: {"fingerprint": name} for name in ("train", "eval")},
        "devices": "8 x TPU v4",
        "versions": {"jaxlora": "0.1.0"},
    }
    (folder / "record.json").write_text(json.dumps(record, indent=2))


def measure(root: Path, out: Path) -> dict[str, float]:
    """Wall-clock and processor seconds and the largest memory, in MB, of the command over the runs."""
    program = (
        "import resource, sys, time\n"
        "from jaxlora.journal import main\n"
        "code = main(sys.argv[1:])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    began = time.perf_counter()
    with (out / "log.txt").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-c", program, str(root), "--html", str(out / "report.html")],
            stdout=log,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
    seconds = time.perf_counter() - began
    processor, memory = map(float, done.stderr.splitlines()[-1].split())
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "memory_mb": round(memory),
        "log_lines": (out / "log.txt").read_text().count("\n"),
        "report_mb": round((out / "report.html").stat().st_size / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "runs"
        began = time.perf_counter()
        for number in range(arguments.runs):
            write_run(root / f"run-{number:04d}", number, arguments.steps)
            if time.perf_counter() - began > 4:
                print(f"writing runs ... {number + 1:,} of {arguments.runs:,}", flush=True)
                began = time.perf_counter()
        size = sum(file.stat().st_size for file in root.rglob("metrics.jsonl"))
        rounds = []
        for _ in range(arguments.rounds):
            rounds.append(measure(root, Path(place)))
            print(json.dumps(rounds[-1]), flush=True)
    figures = {
        "runs": arguments.runs,
        "steps": arguments.steps,
        "metrics_mb": round(size / 1e6),
        "rounds": rounds,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "load": [round(value, 1) for value in os.getloadavg()],
    }
    if arguments.out:
        write(arguments.out, figures)
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    best = min(entry["seconds"] for entry in rounds)
    print(
        f"{arguments.runs:,} runs of {arguments.steps:,} steps: {best:.1f} s, {used:.0f} MB (at most 10 s, 500 MB)"
    )


if __name__ == "__main__":
    main()
