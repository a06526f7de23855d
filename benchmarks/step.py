"""How fast a train step is by kind of attention and remat policy, on the device at hand; no weights are needed.

    python -m benchmarks.step --out benchmarks/results/step-h100.json

Qwen2.5-0.5B's shape with random bfloat16 weights, an adapter of rank 16 on all linear layers, 8,192 tokens a step in
packed rows of two examples. Every kind starts from the same adapter and sees the same batch, so their losses can be
compared; the median of ten steps is reported.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.ours import OurStep, filled, random_base
from benchmarks.report import facts, write
from benchmarks.shapes import spec
from jaxlora.config.build.inputs import attention_platform
from jaxlora.models.attention import Attention

SPEC = spec("0.5B")
SHAPES = ("8x1024", "2x4096")
KINDS = ("plain:full", "blockwise:full", "splash:full", "cudnn:full", "cudnn:dots")
STEPS = 10


def measure(base: dict[str, Any], rows: int, length: int, attention: str, remat: str) -> dict[str, Any]:
    """Losses of the first five steps, and the median time of the next ten."""
    ours = OurStep(SPEC, rows, length, remat=remat, attention=attention, examples=2)
    if ours.compiled is None:
        return {"fits": False}
    step, batch = ours.starter(base), ours.put(filled(rows, length, SPEC.vocab_size, examples=2))
    losses = []
    for _ in range(5):
        sums = step(batch)
        losses.append(float(sums.nll / sums.weight))
    (seconds,) = timing.in_turn({"step": lambda: jax.block_until_ready(step(batch))}, STEPS).values()
    middle, memory = statistics.median(seconds), ours.compiled.memory_analysis()
    assert memory is not None
    return {
        "milliseconds": round(1e3 * middle, 1),
        "tokens_per_second": round(rows * length / middle),
        "temporaries_gb": round(memory.temp_size_in_bytes / 1e9, 2),
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="F.json", help="where the figures go too")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, choices=SHAPES, help="rows and their length")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="attention and remat policy")
    arguments = parser.parse_args()
    device, base, found = jax.devices()[0], random_base(SPEC), {}
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    for shape in arguments.shapes:
        rows, length = map(int, shape.split("x"))
        for attention, remat in (kind.split(":") for kind in arguments.kinds):
            if Attention(attention, attention_platform(device)).refusal(SPEC.head_dim, jnp.bfloat16):
                continue
            name = f"{rows} x {length}, {attention}, {remat}"
            found[name] = measure(base, rows, length, attention, remat)
            print(name, json.dumps(found[name]), flush=True)
    if arguments.out:
        command = shlex.join(["python", "-m", "benchmarks.step", *sys.argv[1:]])
        told = facts(command, device.device_kind, "jax", "jaxlib", "flax")
        write(arguments.out, told | {"results": found})


if __name__ == "__main__":
    main()
