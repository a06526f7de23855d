"""How fast a train step is by kind of attention and remat policy, on the device at hand; no weights are needed.

    python -m benchmarks.step --out benchmarks/results/step-h100.json

Qwen2.5-0.5B's shape with random bfloat16 weights, an adapter of rank 16 on all linear layers, 8,192 tokens a step in
packed rows of two examples. Every kind starts from the same adapter and sees the same batch, so their losses can be
compared; the median of ten steps is reported.
"""

import argparse
import importlib.metadata
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.evaluate import random_base
from benchmarks.memory import SPEC
from jaxlora.config.build import programs
from jaxlora.config.build.inputs import Model, attention_platform
from jaxlora.config.schema import Config
from jaxlora.models.attention import Attention
from jaxlora.models.decoder import Decoder
from jaxlora.parallel.mesh import make_mesh

SHAPES = ((8, 1024), (2, 4096))
KINDS = (("plain", "full"), ("blockwise", "full"), ("splash", "full"), ("cudnn", "full"), ("cudnn", "dots"))
STEPS = 10


def batch(rows: int, length: int, vocabulary: int = SPEC.vocab_size) -> dict[str, jax.Array]:
    """One micro-batch [1, rows, length]: two examples a row, every token trained."""
    ids = np.random.default_rng(1).integers(0, vocabulary, (1, rows, length + 1)).astype(np.int32)
    place, half = np.arange(length, dtype=np.int32), length // 2
    host = {
        "tokens": ids[..., :-1],
        "targets": ids[..., 1:],
        "segments": np.broadcast_to(1 + (place >= half).astype(np.int32), (1, rows, length)),
        "positions": np.broadcast_to(place % half, (1, rows, length)),
        "weights": np.ones((1, rows, length), np.float32),
    }
    return jax.device_put(host)


def measure(base: dict[str, Any], rows: int, length: int, attention: str, remat: str) -> dict[str, Any]:
    """Losses of the first five steps, and the median time of the next ten."""
    config = Config.from_dict(
        {
            "model": {"path": "Qwen/Qwen2.5-0.5B-Instruct", "remat": remat},
            "lora": {"rank": 16, "alpha": 32.0},
            "optim": {"learning_rate": 1e-3, "warmup_steps": 1},
            "data": {"train": "none", "max_length": length},
            "train": {"batch_size": rows, "micro_batch_size": rows},
        }
    )
    device = jax.devices()[0]
    how = Attention(attention, attention_platform(device))
    decoder = Decoder(SPEC, remat=remat, dtype=jnp.bfloat16, attention=how)
    model = Model(None, SPEC, decoder, make_mesh((1, 1, 1), [device]))  # type: ignore[arg-type]
    shapes = programs.state_shapes(config, model, steps=100)
    (step,) = programs.compile_all(model, [programs.lower_train(config, model, shapes)])
    if step is None:
        return {"fits": False}
    state, rows_of_ids, losses, seconds = (
        programs.first_state(config, model, 100, base),
        batch(rows, length),
        [],
        [],
    )
    for _ in range(5):
        state, sums = step(state, base, rows_of_ids)
        losses.append(float(sums.nll / sums.weight))
    for _ in range(STEPS):
        began = time.perf_counter()
        state, sums = jax.block_until_ready(step(state, base, rows_of_ids))
        seconds.append(time.perf_counter() - began)
    middle = statistics.median(seconds)
    return {
        "milliseconds": round(1e3 * middle, 1),
        "tokens_per_second": round(rows * length / middle),
        "temporaries_gb": round(step.memory_analysis().temp_size_in_bytes / 1e9, 2),
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="F.json", help="where the figures go too")
    arguments = parser.parse_args()
    device, base, found = jax.devices()[0], random_base(SPEC), {}
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    for rows, length in SHAPES:
        for attention, remat in KINDS:
            if Attention(attention, attention_platform(device)).refusal(SPEC.head_dim, jnp.bfloat16):
                continue
            name = f"{rows} x {length}, {attention}, {remat}"
            found[name] = measure(base, rows, length, attention, remat)
            print(name, json.dumps(found[name]), flush=True)
    if arguments.out:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
        told = {"command": "python -m benchmarks.step", "device": device.device_kind, "versions": versions}
        arguments.out.write_text(json.dumps(told | {"results": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
