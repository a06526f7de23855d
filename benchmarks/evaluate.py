"""How much longer an evaluation with every metric takes than the forward pass and the loss alone.

    python -m benchmarks.evaluate

Both sides go over the same tokens with the same random bfloat16 weights, in turn, several times: on one side a run's
own evaluation (compiled step, sums on the host, every metric of tokens, groups by turn), on the other a compiled
program that runs the decoder and adds up the negative log-likelihood, and nothing else. Reported are medians, ranges,
and the median over the rounds of the ratio, which must not be above 1.2; likewise of processor seconds, which other
work on the machine disturbs less.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import commands, timing
from benchmarks.ours import random_base
from benchmarks.report import Report, device, table
from benchmarks.shapes import spec
from jaxlora.core.compilation import compiler_options
from jaxlora.data.batches import EvalBatches, Examples
from jaxlora.models.decoder import Decoder, unembedding
from jaxlora.models.spec import DecoderSpec
from jaxlora.training.evaluate import Evaluator, Groups
from jaxlora.training.losses import cross_entropy
from jaxlora.training.metrics import METRICS
from jaxlora.training.step import make_eval_step

VOCABULARIES = {"SmolLM2's vocabulary": 49_152, "Qwen2.5's vocabulary": 151_936}
ROWS, LENGTH = 4, 256


def examples(vocabulary: int, rows: int) -> Examples:
    """As many examples that fill a row each, with two trained stretches."""
    ids = LENGTH + 1
    trained = np.tile(np.arange(ids) % 128 >= 64, rows)
    return Examples(
        ids=np.random.default_rng(0).integers(0, vocabulary, rows * ids).astype(np.int32),
        trained=trained,
        offsets=np.arange(rows + 1, dtype=np.int64) * ids,
        source_rows=np.arange(rows, dtype=np.int64),
        conversations=rows,
        truncated=0,
        dropped=0,
        max_length=LENGTH,
        name="drawn",
    )


def measure(shape: DecoderSpec, batches: int, rounds: int) -> dict[str, Any]:
    """Both sides in turn; seconds of each round."""
    decoder, vocabulary = Decoder(shape, remat="full", dtype=jnp.dtype(jnp.bfloat16)), shape.vocab_size
    base = random_base(shape)
    data = EvalBatches(examples(vocabulary, batches * ROWS), ROWS, LENGTH)
    options = compiler_options(jax.devices()[0].platform)

    def loss_alone(lora, base, batch):
        hidden: Any = decoder.apply(
            {"params": base, "lora": lora}, batch["tokens"], batch["positions"], batch["segments"]
        )
        return jnp.sum(cross_entropy(hidden, unembedding(base), batch["targets"], batch["weights"])[1].nll)

    def compiled(function):
        return jax.jit(function, compiler_options=options).lower({}, base, data.batch(0)).compile()

    step, forward = compiled(make_eval_step(decoder)), compiled(loss_alone)
    evaluator = Evaluator(step, data, jax.device_put, tuple(METRICS), Groups(data.examples))

    def everything() -> float:
        return evaluator({}, base).metrics["eval/nll"]

    def alone() -> float:
        sums = [forward({}, base, jax.device_put(data.batch(i))) for i in range(data.num_batches)]
        return float(np.sum(jax.device_get(sums), dtype=np.float64)) / data.examples.trained_tokens

    sides = {"all metrics": everything, "forward and loss": alone}
    nll = {name: side() for name, side in sides.items()}
    assert abs(nll["all metrics"] / nll["forward and loss"] - 1) < 1e-5, nll
    taken = timing.in_turn(sides, rounds, clock=lambda: np.array([time.perf_counter(), time.process_time()]))
    seconds, processor = (
        {name: [float(each[i]) for each in both] for name, both in taken.items()} for i in (0, 1)
    )
    megabytes = {
        name: round(memory.temp_size_in_bytes / 1e6, 1)
        for name, program in (("all metrics", step), ("forward and loss", forward))
        if (memory := program.memory_analysis())
    }
    return {
        "vocabulary": vocabulary,
        "tokens": data.num_batches * ROWS * LENGTH,
        "tokens_per_second": {
            name: round(data.num_batches * ROWS * LENGTH / statistics.median(times))
            for name, times in seconds.items()
        },
        "seconds": {name: [round(s, 3) for s in times] for name, times in seconds.items()},
        "temporary_megabytes": megabytes,
        **_ratio("ratio", seconds),
        **_ratio("processor_ratio", processor),
    }


def _ratio(name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """Median over the rounds, and the range."""
    found = timing.ratios(times["all metrics"], times["forward and loss"])
    return {
        name: round(found["median"], 3),
        f"{name}s": [round(found["least"], 3), round(found["most"], 3)],
    }


def main() -> None:
    parser = commands.parser(__doc__, rounds=5)
    parser.add_argument(
        "--batches", type=commands.positive, default=1, help=f"of {ROWS} rows of {LENGTH} tokens (1)"
    )
    arguments = parser.parse_args()
    told, where = Report("evaluate", arguments), device()
    shapes = {name: dataclasses.replace(spec("135M"), vocab_size=size) for name, size in VOCABULARIES.items()}
    if arguments.toy:
        shapes = {"toy": spec("toy")}
    found = {name: measure(shape, arguments.batches, arguments.rounds) for name, shape in shapes.items()}
    rows = []
    for name, one in found.items():
        rows.append(
            (
                name,
                *(timing.shown(timing.spread(times)) for times in one["seconds"].values()),
                *(
                    f"{one[key]:.3f} ({one[f'{key}s'][0]:.3f}-{one[f'{key}s'][1]:.3f})"
                    for key in ("ratio", "processor_ratio")
                ),
                f"{one['tokens_per_second']['all metrics']:,}",
            )
        )
    table(
        ("", "all metrics, s", "forward and loss, s", "ratio", "of processor s", "tokens/s, all metrics"),
        rows,
    )
    model = f"{'a toy' if arguments.toy else 'SmolLM2-135M'}'s shape, random bfloat16 weights"
    told.write(where, ("jax", "jaxlib", "flax", "numpy"), found, model=model)


if __name__ == "__main__":
    main()
