"""How fast a train step is, and what memory it takes, beside transformers + PEFT on the same work.

    python -m benchmarks.train_vs_peft                                        # steps of full rows, by shape
    python -m benchmarks.train_vs_peft --conversations gsm8k/train.jsonl --tokenizer qwen2.5
                                                                             # packed beside padded, useful tokens/s

Each side is a process of its own (ours, PEFT, PEFT with torch.compile), each with the same shape, rows, tokens, random
weights, LoRA of rank 16 on all linear layers, AdamW and remat, in every dtype that is asked for; a round is a few steps
of each, in turn. Reported are tokens/s and the ratio to the fastest of PEFT's, medians and ranges over the rounds, in
each dtype and with each side in its best one; and the peak memory of each process: resident memory on a CPU, since the
process began and while it was timed, allocated memory on a GPU. Conversations: ours packs them, PEFT's batches are as
many conversations as there are rows, padded to the longest, as TRL's are by default; what counts is no padding. Of a
step with more rows than --at-once, ours computes so many at a time (train.micro_batch_size, whose default is 8 too).

Each side keeps what it compiled, as its users have it: ours in jaxlora's compilation cache, torch's in its own. What
compiling leaves in memory is therefore a part of a first run's peaks.

Without remat, as little is computed again as each side can do with: ours is what model.remat = "auto" tries first, on a
GPU, and on a CPU in bfloat16, "dots"; PEFT's keeps everything, and where a GPU has no room for that, computes every
layer again (`facts` say so).

It needs torch and peft: pip install torch==2.13.0 peft. Without them ours alone is measured.
"""

import contextlib
import itertools
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import commands, report, timing
from benchmarks.children import Child, SideError
from benchmarks.shapes import SHAPES
from jaxlora.runs.progress import Progress

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart_assets"
ON_GPU = Path("/dev/nvidiactl").exists()  # asking JAX would take a part of the memory that is measured
MOST_CONVERSATIONS = 2000


def sides(arguments: Namespace) -> dict[str, tuple[str, str]]:
    """Name -> its child's module, and what of it torch compiles."""
    found = {"jaxlora": ("benchmarks.side_jaxlora", "none")}
    missing = commands.absent(torch="torch==2.13.0", peft="peft")
    if missing:
        print(f"PEFT: {missing}", flush=True)
        return found
    found["PEFT"] = ("benchmarks.side_peft", "none")
    # Padded batches differ in length: compiled, each length would be compiled anew.
    if arguments.compile != "none" and not arguments.conversations:
        found["PEFT, compiled"] = ("benchmarks.side_peft", arguments.compile)
    if "PEFT" not in arguments.sides:
        del found["PEFT"]
    if "compiled" not in arguments.sides:
        found.pop("PEFT, compiled", None)
    return found


def measure(
    shape: str, remat: str, examples: str, arguments: Namespace, progress: Progress
) -> dict[str, Any]:
    """All sides in all dtypes, in turn: by name, seconds and tokens of each round, peaks and facts; or why not."""
    jobs = {
        f"{name}, {dtype}": (
            module,
            {
                "shape": shape, "dtype": dtype, "remat": remat, "rows": arguments.rows, "length": arguments.length,
                "steps": arguments.steps, "at_once": arguments.at_once, "examples": examples, "compile": compiled,
                "scan_layers": arguments.scan_layers,
            },
        )
        for (name, (module, compiled)), dtype in itertools.product(sides(arguments).items(), arguments.dtypes)
    }  # fmt: skip
    found: dict[str, Any] = {name: {"rounds": []} for name in jobs}
    living: dict[str, Child] = {}

    def fail(name: str, error: SideError) -> None:
        found[name] = {"failed": str(error)}
        living.pop(name, None)
        print(f"{name}: does not work here: {error}", flush=True)

    def begun(name: str) -> Child | SideError:
        try:
            return Child(*jobs[name])
        except SideError as error:
            return error

    def start(*names: str) -> None:
        # One after the other on a CPU; a GPU's host has cores enough. There XLA's and torch's compilers time kernels
        # while the other side's do.
        with (
            progress.stage(f"{shape}: getting {', '.join(names)} ready"),
            ThreadPoolExecutor(len(names) if ON_GPU else 1) as pool,
        ):
            for name, made in zip(names, pool.map(begun, names), strict=True):
                if isinstance(made, SideError):
                    fail(name, made)
                else:
                    living[name], found[name]["facts"] = made, made.facts
                    jobs[name][1]["remat"] = made.facts["remat"]  # what fits need not be found again

    def end(name: str) -> None:
        for key, peak in living.pop(name).end().items():
            found[name][key] = max(peak, found[name].get(key, 0))

    try:
        if not arguments.apart:
            start(*jobs)
        for turn in range(arguments.rounds):
            for name in list(jobs)[:: -1 if turn % 2 else 1]:
                if "failed" in found[name]:
                    continue
                if arguments.apart:
                    start(name)
                if name not in living:
                    continue
                try:
                    with progress.stage(f"{shape}: round {turn + 1} of {arguments.rounds}, {name}"):
                        found[name]["rounds"].append(living[name].run())
                    if arguments.apart:
                        end(name)
                except SideError as error:
                    fail(name, error)
        for name in list(living):
            try:
                end(name)
            except SideError as error:
                fail(name, error)
    finally:
        for child in living.values():
            child.kill()
    return found


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens/s of each side that worked, and our ratio to the fastest of PEFT's: in each dtype, and each in its best.

    Returns:
        "speed": name -> spread. "ratio", "memory": "float32", "bfloat16", "best" -> spread of the rounds' ratios; our
        peak as a share of that side's.
    """
    speeds = {
        name: [turn["tokens"] / turn["seconds"] for turn in one["rounds"]]
        for name, one in found.items()
        if "failed" not in one
    }
    told: dict[str, Any] = {
        "speed": {name: timing.spread(s) for name, s in speeds.items()},
        "ratio": {},
        "memory": {},
    }
    dtypes = dict.fromkeys(name.rpartition(", ")[2] for name in found)
    for dtype in (*dtypes, "best"):
        among = [name for name in speeds if dtype == "best" or name.endswith(f", {dtype}")]
        ours = [name for name in among if name.startswith("jaxlora")]
        theirs = [name for name in among if name.startswith("PEFT")]
        if ours and theirs:
            mine, other = (
                max(each, key=lambda name: told["speed"][name]["median"]) for each in (ours, theirs)
            )
            told["ratio"][dtype] = timing.ratios(speeds[mine], speeds[other]) | {"of": mine, "to": other}
            told["memory"][dtype] = found[mine]["peak_whole"] / found[other]["peak_whole"]
    return told


def tell(title: str, found: Mapping[str, Any], summed: Mapping[str, Any]) -> None:
    print(f"\n{title}")
    report.table(
        ("", "remat", "tokens/s", "peak while timed, GB", "since its start, GB"),
        [
            (
                name,
                found[name]["facts"]["remat"],
                timing.shown(speed, digits=0),
                f"{found[name]['peak'] / 1e9:.2f}",
                f"{found[name]['peak_whole'] / 1e9:.2f}",
            )
            for name, speed in summed["speed"].items()
        ],
    )
    for dtype, ratio in summed["ratio"].items():
        what = "each side in its best dtype" if dtype == "best" else f"both in {dtype}"
        print(
            f"{what}: {timing.shown(ratio)} times the tokens/s of {ratio['to']}, "
            f"{summed['memory'][dtype]:.0%} of its peak memory"
        )


@contextlib.contextmanager
def encoded(arguments: Namespace, progress: Progress) -> Iterator[str]:
    """The file of encoded conversations that all sides read; "" where full rows are measured."""
    if not arguments.conversations:
        yield ""
        return
    from jaxlora.data.batches import prepare
    from jaxlora.data.chat import ChatEncoder, load_tokenizer
    from jaxlora.data.sources import load_conversations

    with tempfile.TemporaryDirectory() as folder:
        with progress.stage("encoding the conversations") as stage:
            encoder = ChatEncoder(load_tokenizer(str(arguments.tokenizer)))
            source = load_conversations(str(arguments.conversations), "train")
            examples = prepare(source, encoder, arguments.length, cache=Path(folder), progress=stage)
        examples = examples.first(MOST_CONVERSATIONS)
        # Shapes whose vocabulary is smaller than the tokenizer's: what an id is changes no time.
        ids = examples.ids % min(SHAPES[shape]["vocab_size"] for shape in arguments.shapes)
        file = Path(folder) / "examples.npz"
        np.savez(
            file,
            ids=ids,
            trained=examples.trained,
            offsets=examples.offsets,
            source_rows=examples.source_rows,
        )
        yield str(file)


def parse() -> Namespace:
    parser = commands.parser(__doc__, rounds=5)
    shapes = ["0.5B", "1.5B", "7B"] if ON_GPU else ["40M", "135M", "0.5B"]
    parser.add_argument(
        "--shapes",
        type=commands.choices(SHAPES),
        default=shapes,
        help=f"some of {', '.join(SHAPES)} ({','.join(shapes)})",
    )
    parser.add_argument(
        "--rows", type=commands.positive, default=8 if ON_GPU else 4, help="in a step (8 or, on a CPU, 4)"
    )
    parser.add_argument(
        "--length",
        type=commands.positive,
        default=2048 if ON_GPU else 256,
        help="of a row (2048 or, on a CPU, 256)",
    )
    parser.add_argument(
        "--at-once", type=commands.positive, default=8, help="rows that ours computes at a time (8)"
    )
    parser.add_argument("--steps", type=commands.positive, default=4, help="in a round (4)")
    dtypes = ("bfloat16", "float32")
    parser.add_argument(
        "--dtypes",
        type=commands.choices(dtypes),
        default=["bfloat16"] if ON_GPU else [*dtypes],
        help="of the base (bfloat16,float32; on a GPU bfloat16)",
    )
    parser.add_argument(
        "--remat",
        type=commands.choices(("full", "none")),
        default=["full", "none"],
        help="what is computed again in the backward pass: every layer, or as little as fits (full,none)",
    )
    commands.add_scan(parser)
    parser.add_argument(
        "--compile",
        choices=("layers", "whole", "none"),
        default="layers",
        help="what torch.compile is given: each layer and the loss, the whole model (minutes more), nothing (layers)",
    )
    parser.add_argument(
        "--sides",
        type=commands.choices(("PEFT", "compiled")),
        default=["PEFT", "compiled"],
        help="which of PEFT's are measured beside ours (PEFT,compiled)",
    )
    parser.add_argument(
        "--apart",
        action="store_true",
        help="one process at a time, started anew each round: where the sides do not fit beside each other",
    )
    parser.add_argument("--conversations", type=Path, help="jsonl to pack and to pad, instead of full rows")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=QUICKSTART / "base",
        help="folder of their tokenizer (the quickstart's)",
    )
    arguments = parser.parse_args()
    if arguments.rows > arguments.at_once and arguments.rows % arguments.at_once:
        parser.error(f"--rows {arguments.rows} is no multiple of --at-once {arguments.at_once}")
    for file in (arguments.conversations, arguments.tokenizer):
        if file is not None and not file.exists():
            parser.error(f"there is no {file}")
    if arguments.toy:
        arguments.shapes, arguments.rows, arguments.length, arguments.steps = ["toy"], 2, 64, 1
        arguments.dtypes, arguments.remat = arguments.dtypes[:1], arguments.remat[:1]
        arguments.compile = "none"
    return arguments


def main() -> None:
    arguments = parse()
    told = report.Report("train_vs_peft", arguments)
    results: dict[str, Any] = {}
    where = ""
    with Progress(output=sys.stderr) as progress, encoded(arguments, progress) as examples:
        for shape, remat in itertools.product(arguments.shapes, arguments.remat):
            what = "conversations in" if examples else "full"
            title = f"{shape}, {what} rows of {arguments.length}, {arguments.rows} in a step, remat {remat}"
            found = measure(shape, remat, examples, arguments, progress)
            results[title] = {"sides": found, **summary(found)}
            tell(title, found, results[title])
            device = next((one["facts"]["device"] for one in found.values() if "facts" in one), None)
            where = f"{device}, {os.cpu_count()} cores" if device else where
    told.write(
        where, ("jax", "jaxlib", "flax", "torch", "transformers", "peft"), results
    )  # fmt: skip


if __name__ == "__main__":
    main()
