"""How fast answers are written: tokens/s of one conversation, and of batches of prompts.

    python -m benchmarks.generate
    python -m benchmarks.generate --shapes 135M --batches 1,8 --prompt 512

Random weights in bfloat16 without an adapter, greedy, and no id that ends an answer, so every one has its full length.
One conversation: `models.decoding.Session`, as `python -m jaxlora.generate` uses it; the wait for the first token is
told apart from the others. Batches: the one program that answers held-out prompts during training, prompts included.
"""

import time
from argparse import Namespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import commands, report, timing
from benchmarks.ours import random_base
from benchmarks.shapes import SHAPES, spec
from jaxlora.models.decoder import Decoder
from jaxlora.models.decoding import Session, bucket, left_pad
from jaxlora.parallel.mesh import make_mesh
from jaxlora.training.answers import AnswerProgram


def stream(decoder: Decoder, base: Any, arguments: Namespace) -> dict[str, Any]:
    """One conversation: seconds to the first token, and tokens/s from then on; each round another prompt."""
    random, session = np.random.default_rng(0), Session(decoder, base, {})
    waits, speeds = [], []
    for turn in range(arguments.rounds + 1):
        # Another prompt from its first id on: nothing of it is held already.
        prompt = random.integers(0, decoder.spec.vocab_size, arguments.prompt)
        began = time.perf_counter()
        ids = session.answer(prompt, max_new_tokens=arguments.new, stop_ids=())
        next(ids)
        first = time.perf_counter()
        count = sum(1 for _ in ids)
        if turn:
            waits.append(first - began)
            speeds.append(count / (time.perf_counter() - first))
    return {"seconds_to_first": timing.spread(waits), "tokens_per_second": timing.spread(speeds)}


def batch(decoder: Decoder, base: Any, rows: int, arguments: Namespace) -> dict[str, Any]:
    """So many prompts at once: new tokens/s of the whole program."""
    random, mesh = np.random.default_rng(0), make_mesh((1, 1, 1), jax.devices()[:1])
    prompts = [random.integers(0, decoder.spec.vocab_size, arguments.prompt) for _ in range(rows)]
    program = AnswerProgram(decoder, mesh, bucket(arguments.prompt), arguments.new, stop_ids=())
    tokens, padding = left_pad(prompts)
    given = (base, {}, tokens, padding, *program.rest(), np.arange(rows, dtype=np.int32))

    def answer() -> Any:
        return jax.block_until_ready(program.jitted(*given))

    lengths = np.asarray(answer().lengths)
    assert (lengths == arguments.new).all(), lengths
    (seconds,) = timing.in_turn({"answers": answer}, arguments.rounds).values()
    return {"tokens_per_second": timing.spread(rows * arguments.new / each for each in seconds)}


def main() -> None:
    parser = commands.parser(__doc__, rounds=5)
    parser.add_argument(
        "--shapes", type=commands.choices(SHAPES), default=["135M", "0.5B"], help="(135M,0.5B)"
    )
    parser.add_argument(
        "--batches", type=lambda text: [commands.positive(rows) for rows in text.split(",")], default=[1, 8, 32],
        help="prompts at once (1,8,32)",
    )  # fmt: skip
    parser.add_argument("--prompt", type=commands.positive, default=128, help="tokens of a prompt (128)")
    parser.add_argument(
        "--new", type=commands.positive, default=64, help="tokens of an answer, 2 or more (64)"
    )
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.shapes, arguments.batches = ["toy"], [2]
        arguments.prompt, arguments.new = 20, 4
    if arguments.new < 2:
        parser.error(f"--new {arguments.new}: the first token is told apart from the others; at least 2")
    told, where = report.Report("generate", arguments), report.device()
    results: dict[str, Any] = {}
    for shape in arguments.shapes:
        decoder = Decoder(spec(shape), remat="none", dtype=jnp.dtype("bfloat16"))
        base = random_base(decoder.spec)
        results[shape] = {"stream": stream(decoder, base, arguments)}
        for rows in arguments.batches:
            results[shape][f"batch of {rows}"] = batch(decoder, base, rows, arguments)
        print(f"\n{shape}, prompts of {arguments.prompt}, answers of {arguments.new}, {where}")
        report.table(
            ("", "tokens/s", "ms to the first"),
            [
                (
                    name,
                    timing.shown(one["tokens_per_second"], 1),
                    timing.shown(one["seconds_to_first"], 1, 1e-3) if "seconds_to_first" in one else "",
                )
                for name, one in results[shape].items()
            ],
        )
    told.write(where, ("jax", "jaxlib", "flax"), results, prompt=arguments.prompt, new=arguments.new)


if __name__ == "__main__":
    main()
