"""Whether halving finds the winner that training all to the end finds, and what it saves, on the quickstart's sweep:

    python -m benchmarks.halving                # ten seeds, all eight rates to the end: the winner of both
    python -m benchmarks.halving --only time    # the sweep with halving, the sweep without, and eight runs alone

Seeds: a trial's numbers do not depend on which of its siblings go on, so what halving does at its two rungs follows
from the evaluations that a sweep without it makes at these very steps; it is decided by the code that a sweep decides
with. Time: whole commands from start to end, each side with a compilation cache of its own, empty at first; who is
dropped there is compared with what follows for that seed. Prints a table and writes it to
benchmarks/results/halving-cpu.json.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.commands import timed
from benchmarks.report import RESULTS, facts, keep
from jaxlora.config.sweep import load_sweep
from jaxlora.runs.directory import RunDirectory
from jaxlora.sweeps import halving as halvings
from jaxlora.sweeps.ledger import Ledger
from jaxlora.sweeps.ranking import ranking
from jaxlora.sweeps.trials import Halving, Trial

CONFIG = "configs/sweeps/quickstart_lr.py"
NLL = "eval/nll"


def halved(folder: Path, trials: tuple[Trial, ...], halving: Halving) -> tuple[dict[str, int], str]:
    """What halving makes of trials that were all trained to their end.

    Returns:
        Those that are dropped -> at which rung; and the winner, as a sweep ranks: by the best evaluation until then.
    """
    runs = {trial.name: RunDirectory.read(folder / trial.name) for trial in trials}
    last = {name: int(run.record["steps"]) for name, run in runs.items()}
    totals = {trial.name: trial.config.train.max_steps for trial in trials}
    out: dict[str, int] = {}
    for number in range(len(halving.rungs)):
        there = {
            name: run.read_evaluation(halving.step(number, totals[name]))
            for name, run in runs.items()
            if name not in out and last[name] >= halving.step(number, totals[name])
        }
        for name in halvings.dropped(halving, there):
            out[name] = number + 1
            last[name] = halving.step(number, totals[name])
    best = {
        name: min(
            line[NLL] for line in run.metrics() if line.get(NLL) is not None and line["step"] <= last[name]
        )
        for name, run in runs.items()
    }
    return out, min(best, key=lambda name: best[name])


def seeds(count: int, folder: Path) -> Iterator[dict[str, Any]]:
    """The winner of each seed, of both."""
    for seed in range(count):
        here = folder / f"seed{seed}"
        timed("sweep", [*_sweep(here), "--config.sweep.halving.rungs=", f"--config.base.seed={seed}"])
        sweep = load_sweep(CONFIG, [])
        assert sweep.halving is not None
        dropped, halved_winner = halved(here, sweep.trials, sweep.halving)
        winner, *others = ranking(here, sweep.trials)
        place = {each.trial.name: each for each in (winner, *others)}[halved_winner]
        kept = [trial.name for trial in sweep.trials if trial.name not in dropped]
        same = "the same" if place is winner else f"{halved_winner} ({place.nll:.4f})"
        told = "all go on" if not dropped else f"to the end go {', '.join(kept)}"
        print(
            f"seed {seed}: {winner.trial.name} ({winner.nll:.4f}) wins; with halving {same}; {told}",
            flush=True,
        )
        yield {
            "seed": seed,
            "winner": winner.trial.name,
            "nll": winner.nll,
            "winner_of_halving": halved_winner,
            "nll_of_halving": place.nll,
            "tied": place is winner or place.tied,
            "dropped": dropped,
            "to_the_end": kept,
        }


def times(folder: Path) -> dict[str, Any]:
    """Seconds of the sweep with halving, of the sweep without, and of its trials one by one."""
    sweep = load_sweep(CONFIG, [])
    taken = {
        "halving": timed("sweep", _sweep(folder / "halving"), folder / "cache1"),
        "all": timed("sweep", [*_sweep(folder / "all"), "--config.sweep.halving.rungs="], folder / "cache2"),
    }
    print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in taken.items()), flush=True)
    taken["one_by_one"] = sum(
        timed(
            "train",
            ["--config", "configs/quickstart.py", "--workdir", f"{folder / str(number)}",
             "--config.eval.generate=0", "--config.eval.every=30",
             *(f"--config.{key}={value}" for key, value in trial.changes.items())],
            folder / "cache3",
        )
        for number, trial in enumerate(sweep.trials)
    )  # fmt: skip
    assert sweep.halving is not None
    dropped = {name: facts["rung"] for name, facts in Ledger(folder / "halving").dropped.items()}
    expected, _ = halved(folder / "all", sweep.trials, sweep.halving)
    steps = {
        side: sum(RunDirectory.read(folder / side / trial.name).record["steps"] for trial in sweep.trials)
        for side in ("halving", "all")
    }
    by_one = taken["one_by_one"]
    told = [
        f"{by_one / taken[side]:.2f} times as long as {what} halving"
        for side, what in (("halving", "with"), ("all", "without"))
    ]
    print(f"one by one {by_one:.0f} s: {', '.join(told)}; steps {steps}", flush=True)
    assert dropped == expected, (
        f"{dropped} were dropped, and {expected} follows from the sweep without halving"
    )
    return {"seconds": taken, "steps": steps, "dropped": dropped}


def _sweep(workdir: Path) -> list[str]:
    return ["--config", CONFIG, "--workdir", str(workdir)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("seeds", "time"), default="seeds")
    parser.add_argument("--seeds", type=int, default=10, help="how many (10)")
    parser.add_argument("--folder", type=Path, help="for the sweeps; one that is there is gone on with")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.only == "time":
            _keep("time", times(folder))
            return
        found = []
        for one in seeds(arguments.seeds, folder):  # an hour and more: what is known is written at once
            found.append(one)
            _keep("seeds", found)


def _keep(part: str, found: Any) -> None:
    command = shlex.join(["python", "-m", "benchmarks.halving", *sys.argv[1:]])
    told = facts(command, f"cpu, {os.cpu_count()} cores", "jax", "jaxlib", "flax") | {"results": found}
    keep(RESULTS / "halving-cpu.json", {part: told})


if __name__ == "__main__":
    main()
