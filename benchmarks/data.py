"""How many conversations a second go from jsonl to packed batches, and how full the rows are.

    python -m benchmarks.data --conversations gsm8k/train.jsonl --tokenizer qwen2.5
    python -m benchmarks.data                        # the quickstart's own data, which is tiny

Each time in a process of its own, which is counted from its first look at the file (imports and the tokenizer's loading
come before it): read, template and tokenise, lay out, make every batch of an epoch. Cold: with empty caches, in a
folder of their own. Cached: the same once more. Efficiency: the share of positions that hold a token, beside that of
TRL's "bfd" strategy over the same lengths, where it is installed: pip install trl.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks import commands, report, timing
from benchmarks.train_vs_peft import QUICKSTART
from jaxlora.core.imports import without_torch


def child(arguments: Namespace) -> None:
    """One pass over the data; prints seconds by part, and what came of it."""
    with without_torch():  # as every command does
        # Imports that are not to be timed; datasets makes the second as it opens its first file.
        import datasets  # noqa: F401
        import scipy.io  # noqa: F401

        from jaxlora.data.batches import Batches, prepare
        from jaxlora.data.chat import ChatEncoder, load_tokenizer
        from jaxlora.data.sources import load_conversations

    encoder = ChatEncoder(load_tokenizer(str(arguments.tokenizer)))
    marks = [time.perf_counter()]
    source = load_conversations(str(arguments.conversations), "train")
    marks.append(time.perf_counter())
    examples = prepare(source, encoder, arguments.length)
    marks.append(time.perf_counter())
    batches = Batches(examples, arguments.rows, arguments.length)
    marks.append(time.perf_counter())
    for step in range(1, batches.steps_per_epoch + 1):
        batches.batch(step)
    marks.append(time.perf_counter())
    parts = ("read", "tokenise", "pack", "batches")
    print(
        json.dumps(
            {
                "seconds": marks[-1] - marks[0],
                "parts": {
                    name: end - start for name, start, end in zip(parts, marks[:-1], marks[1:], strict=True)
                },
                "conversations": len(source),
                "tokens": examples.tokens,
                "rows": len(batches.rows),
                "efficiency": batches.efficiency,
                "lengths": examples.lengths.tolist(),
            }
        )
    )


def passes(arguments: Namespace) -> dict[str, list[dict[str, Any]]]:
    """Each round: a pass with empty caches, and one with what that left in them."""
    command = [
        sys.executable, "-m", "benchmarks.data", "--child", "--conversations", str(arguments.conversations),
        "--tokenizer", str(arguments.tokenizer), "--length", str(arguments.length), "--rows", str(arguments.rows),
    ]  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {"cold": [], "cached": []}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"HF_HOME": folder, "HF_DATASETS_CACHE": f"{folder}/datasets"}
            for taken in found.values():
                printed = subprocess.run(
                    command, env=environment, stdout=subprocess.PIPE, text=True, check=True
                )
                taken.append(json.loads(printed.stdout.splitlines()[-1]))
    return found


def bfd(lengths: list[int], capacity: int) -> float:
    """The efficiency of TRL's packing of examples of these lengths."""
    import datasets
    from trl import pack_dataset  # pyright: ignore

    datasets.disable_progress_bars()
    given = datasets.Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    return sum(lengths) / (len(pack_dataset(given, seq_length=capacity, strategy="bfd")) * capacity)


def main() -> None:
    parser = commands.parser(__doc__, rounds=3)
    parser.add_argument("--conversations", type=Path, default=QUICKSTART / "train.jsonl", help="jsonl")
    parser.add_argument("--tokenizer", type=Path, default=QUICKSTART / "base", help="folder of a tokenizer")
    parser.add_argument("--length", type=commands.positive, default=512, help="of a row (512)")
    parser.add_argument("--rows", type=commands.positive, default=8, help="of a batch (8)")
    parser.add_argument("--child", action="store_true", help="one pass, in this process")
    arguments = parser.parse_args()
    for file in (arguments.conversations, arguments.tokenizer):
        if not file.exists():
            parser.error(f"there is no {file}")
    if arguments.child:
        child(arguments)
        return
    if arguments.toy:
        arguments.conversations = QUICKSTART / "eval.jsonl"
    told = report.Report("data", arguments)
    taken = passes(arguments)
    first = taken["cold"][0]
    lengths = first["lengths"]
    results: dict[str, Any] = {key: first[key] for key in ("conversations", "tokens", "rows", "efficiency")}
    print(f"{arguments.conversations}: {first['conversations']:,} conversations, {first['tokens']:,} tokens")
    rows = []
    for name, each in taken.items():
        results[name] = {
            "seconds": timing.spread(one["seconds"] for one in each),
            "conversations_per_second": timing.spread(one["conversations"] / one["seconds"] for one in each),
            "parts": {part: timing.spread(one["parts"][part] for one in each) for part in first["parts"]},
        }
        parts = ", ".join(f"{part} {found['median']:.2f}" for part, found in results[name]["parts"].items())
        speed = timing.shown(results[name]["conversations_per_second"], 0)
        rows.append((name, timing.shown(results[name]["seconds"]), speed, parts))
    report.table(("", "seconds", "conversations/s", "medians of the parts, s"), rows)
    print(
        f"rows of {arguments.length}: {first['rows']:,}, {first['efficiency']:.2%} of their positions hold a token"
    )
    missing = commands.absent(trl="trl")
    if missing:
        print(f"TRL's bfd: {missing}")
    else:
        results["efficiency_of_bfd"] = bfd(lengths, arguments.length)
        print(f"TRL's bfd: {results['efficiency_of_bfd']:.2%}")
    told.write(
        f"cpu, {os.cpu_count()} cores",
        ("datasets", "transformers", "tokenizers", "numpy", "trl"),
        results,
        length=arguments.length,
    )


if __name__ == "__main__":
    main()
