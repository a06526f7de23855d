"""How much longer an evaluation with every metric takes than the forward pass and the loss alone.

    python -m benchmarks.evaluate --out benchmarks/results/evaluate.json

Both sides go over the same tokens with the same random bfloat16 weights, in turn, several times: on one side a run's
own evaluation (compiled step, sums on the host, every metric of tokens, groups by turn), on the other a compiled
program that runs the decoder and adds up the negative log-likelihood, and nothing else. Reported are medians, ranges,
and the median over the rounds of the ratio, which must not be above 1.2; likewise of processor seconds, which other
work on the machine disturbs less.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.core.compilation import compiler_options
from jaxlora.core.tree import unflatten
from jaxlora.data.batches import EvalBatches, Examples
from jaxlora.models.decoder import Decoder, unembedding
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import param_shapes
from jaxlora.training.evaluate import Evaluator, Groups
from jaxlora.training.losses import cross_entropy
from jaxlora.training.metrics import METRICS
from jaxlora.training.step import make_eval_step

VOCABULARIES = {"SmolLM2's vocabulary": 49_152, "Qwen2.5's vocabulary": 151_936}
ROWS, LENGTH = 4, 256


def spec(vocabulary: int) -> DecoderSpec:
    """SmolLM2-135M's numbers, with that many words."""
    return DecoderSpec(
        model_type="llama", vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_layers=30,
        num_heads=9, num_kv_heads=3, head_dim=64, rms_norm_eps=1e-5, rope_theta=100_000.0, qkv_bias=False,
        tie_word_embeddings=True, sliding_window=None, max_position_embeddings=8192,
    )  # fmt: skip


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


def random_base(spec: DecoderSpec) -> dict[str, Any]:
    """Random bfloat16 weights of that shape; norms of one."""
    draw = np.random.default_rng(0)
    return unflatten(
        {
            path: jnp.asarray(
                np.ones(shape) if path[-1] == "scale" else 0.02 * draw.standard_normal(shape, np.float32),
                jnp.bfloat16,
            )
            for path, shape in param_shapes(spec).items()
        }
    )


def measure(vocabulary: int, batches: int, rounds: int) -> dict[str, Any]:
    """Both sides in turn; seconds of each round."""
    decoder = Decoder(spec(vocabulary), remat="full", dtype=jnp.dtype(jnp.bfloat16))
    base = random_base(decoder.spec)
    data = EvalBatches(examples(vocabulary, batches * ROWS), ROWS, LENGTH)
    options = compiler_options(jax.devices()[0].platform)

    def loss_alone(lora, base, batch):
        hidden = decoder.apply(
            {"params": base, "lora": lora}, batch["tokens"], batch["positions"], batch["segments"]
        )
        return jnp.sum(cross_entropy(hidden, unembedding(base), batch["targets"], batch["weights"])[1].nll)

    def compiled(function):
        return jax.jit(function).lower({}, base, data.batch(0)).compile(compiler_options=options)

    step, forward = compiled(make_eval_step(decoder)), compiled(loss_alone)
    evaluator = Evaluator(step, data, jax.device_put, tuple(METRICS), Groups(data.examples))

    def everything() -> float:
        return evaluator({}, base).metrics["eval/nll"]

    def alone() -> float:
        sums = [forward({}, base, jax.device_put(data.batch(i))) for i in range(data.num_batches)]
        return float(np.sum(jax.device_get(sums), dtype=np.float64)) / data.examples.trained_tokens

    sides = {"all metrics": everything, "forward and loss": alone}
    nll = {name: side() for name, side in sides.items()}  # also the warming up
    assert abs(nll["all metrics"] / nll["forward and loss"] - 1) < 1e-5, nll
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 else -1]:  # each goes first in turn
            began, began_processor = time.perf_counter(), time.process_time()
            sides[name]()
            seconds[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - began_processor)
    megabytes = {
        name: round(program.memory_analysis().temp_size_in_bytes / 1e6, 1)
        for name, program in (("all metrics", step), ("forward and loss", forward))
    }
    return {
        "vocabulary": vocabulary,
        "tokens": data.num_batches * ROWS * LENGTH,
        "seconds": {name: [round(s, 3) for s in times] for name, times in seconds.items()},
        "temporary_megabytes": megabytes,
        **_ratio("ratio", seconds),
        **_ratio("processor_ratio", processor),
    }


def _ratio(name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """Median over the rounds, and the range."""
    ratios = [a / b for a, b in zip(times["all metrics"], times["forward and loss"], strict=True)]
    return {
        name: round(statistics.median(ratios), 3),
        f"{name}s": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=1, help=f"of {ROWS} rows of {LENGTH} tokens")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is timed")
    parser.add_argument("--out", type=Path, metavar="F.json", help="where the figures go too")
    arguments = parser.parse_args()
    print(f"{'':22} {'all metrics, s':>22} {'forward and loss, s':>22} {'ratio':>20} {'of processor s':>20}")
    found = {}
    for name, vocabulary in VOCABULARIES.items():
        found[name] = one = measure(vocabulary, arguments.batches, arguments.rounds)
        cells = [
            f"{statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f})"
            for times in one["seconds"].values()
        ]
        cells += [
            f"{one[key]:.3f} ({one[f'{key}s'][0]:.3f}-{one[f'{key}s'][1]:.3f})"
            for key in ("ratio", "processor_ratio")
        ]
        print(f"{name:22} {cells[0]:>22} {cells[1]:>22} {cells[2]:>20} {cells[3]:>20}", flush=True)
    if arguments.out:
        devices = jax.devices()
        told = {
            "command": " ".join(["python -m benchmarks.evaluate", *sys.argv[1:]]),
            "versions": {
                name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")
            }
            | {"python": platform.python_version()},
            "device": f"{len(devices)} x {devices[0].device_kind}",
            "model": "SmolLM2-135M's shape, random bfloat16 weights",
            "results": found,
        }
        arguments.out.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
