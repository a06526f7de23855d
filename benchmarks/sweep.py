"""What training K adapters together takes, beside training them one after another:

    python -m benchmarks.sweep                 # bare steps, small rows and large ones
    python -m benchmarks.sweep --only whole    # whole commands: start, loading, compilation, training, evaluation

Bare steps: a model of SmolLM2-135M's shape with random bfloat16 weights, adapters of rank 16 on all linear layers. Both
sides in turn, in one process, after a warm-up: one step of a stack of K, and K steps of one adapter. Whole: the
quickstart's first 40 steps with K learning rates, of 16 rows as it has them and of one, by one `sweep` and by K
`train`, each side with a compilation cache of its own, empty at first. Prints a table and writes it to
benchmarks/results/sweep-PLATFORM.json.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks import report, timing
from benchmarks.commands import timed
from benchmarks.ours import OurStep, filled, random_base
from benchmarks.shapes import spec
from jaxlora.config.build import programs, stacking
from jaxlora.sweeps.stack import Stack

SPEC = spec("135M")
TRIALS = (1, 4, 8, 12)
SHAPES = ((1, 32), (1, 128), (4, 256))
"""Rows and tokens of a micro-batch."""

WHOLE_STEPS = 40
WHOLE_ROWS = (1, 16)
"""Rows of 192 tokens in a step of a whole run: few, and the quickstart's own."""
RATES = (2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 2e-2)


def bare(base: dict[str, Any], rows: int, length: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step of each stack, and of as many steps of one adapter, by K; medians of the rounds."""
    ours = OurStep(SPEC, rows, length)
    config, model, single = ours.config, ours.model, ours.compiled
    assert single is not None
    form = stacking.form([config], model, [100])
    given = ours.put(filled(rows, length, SPEC.vocab_size, examples=2))
    alone = programs.first_state(config, model, 100, base)

    def one_by_one(count: int) -> None:
        nonlocal alone
        for _ in range(count):
            alone, sums = single(alone, base, given)
        jax.block_until_ready(sums)

    found = {}
    for count in TRIALS:
        (program,) = programs.compile_all(model, [stacking.lower_train(form, count)])
        assert program is not None
        names = [str(i) for i in range(count)]
        stack = Stack(model.mesh, form.like, names)
        for name in names:
            stack.put(name, programs.first_state(config, model, 100, base))

        def together(program=program, stack=stack, names=names) -> None:
            made = stack.step(program, base, given, names)
            made[names[0]].numbers()

        seconds = in_turn(together, lambda count=count: one_by_one(count), rounds)
        found[str(count)] = seconds | {
            "temporaries": _temporaries(program),
            "temporaries_alone": _temporaries(single),
        }
        told = f"{found[str(count)]['ratio']:.2f} times as fast"
        print(f"{rows} x {length} tokens, {count:2} trials: together {seconds['together']:.3f} s, "
              f"one by one {seconds['one_by_one']:.3f} s: {told}", flush=True)  # fmt: skip
    return found


def _temporaries(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def in_turn(first: Callable[[], None], second: Callable[[], None], rounds: int) -> dict[str, Any]:
    """Medians and ranges of both, in seconds, and the median of the rounds' ratios."""
    taken = timing.in_turn({"together": first, "one_by_one": second}, rounds)
    return {
        **{name: statistics.median(seconds) for name, seconds in taken.items()},
        "ratio": timing.ratios(taken["one_by_one"], taken["together"])["median"],
        "ranges": [[min(side), max(side)] for side in taken.values()],
    }


def whole(rows: int, counts: tuple[int, ...]) -> dict[str, Any]:
    """Seconds of whole commands with so many rows in a step, by K."""
    found = {}
    settings = {
        "train.max_steps": WHOLE_STEPS,
        "train.batch_size": rows,
        "train.micro_batch_size": rows,
        "eval.every": 20,
    }
    for count in counts:
        rates = RATES[:count]
        with tempfile.TemporaryDirectory() as folder:
            together = timed(
                "sweep",
                ["--config", "configs/sweeps/quickstart_lr.py", "--workdir", f"{folder}/sweep",
                  "--config.sweep.halving.rungs=", f"--config.sweep.grid={{'optim.learning_rate': {list(rates)}}}",
                  *(f"--config.base.{key}={value}" for key, value in settings.items())],
                Path(folder) / "cache of the sweep",
            )  # fmt: skip
            alone = sum(
                timed(
                    "train",
                    ["--config", "configs/quickstart.py", "--workdir", f"{folder}/{rate:g}",
                     "--config.eval.generate=0", f"--config.optim.learning_rate={rate}",
                     *(f"--config.{key}={value}" for key, value in settings.items())],
                    Path(folder) / "cache of the runs",
                )
                for rate in rates
            )  # fmt: skip
        found[str(count)] = {"together": together, "one_by_one": alone, "ratio": alone / together}
        told = f"{alone / together:.2f} times as fast"
        print(f"{count} whole runs of {WHOLE_STEPS} steps of {rows} rows: one sweep {together:.0f} s, "
              f"one by one {alone:.0f} s: {told}", flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("bare", "whole"), default="bare")
    parser.add_argument("--rounds", type=int, default=3, help="of bare steps (3)")
    parser.add_argument("--trials", default="1,4,8,12", help="of whole runs (1,4,8,12)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if arguments.only == "whole":
        counts = tuple(map(int, arguments.trials.split(",")))
        found = {f"{rows} x 192": whole(rows, counts) for rows in WHOLE_ROWS}
    else:
        base = random_base(SPEC)
        found = {f"{rows} x {length}": bare(base, rows, length, arguments.rounds) for rows, length in SHAPES}
    out = arguments.out or report.RESULTS / f"sweep-{device.platform}.json"
    command, where = f"python -m benchmarks.sweep --only {arguments.only}", report.device()
    told = report.facts(command, where, "jax", "jaxlib", "flax") | {"results": found}
    report.keep(out, {arguments.only: told})


if __name__ == "__main__":
    main()
