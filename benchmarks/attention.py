"""What attention takes in memory, by kind and length of a row, as the compiler says (no weights, nothing is run):

    python -m benchmarks.attention                        # for the devices at hand
    python -m benchmarks.attention --topology v5e:2x4     # for one such TPU chip; needs libtpu, no TPU

Two programs, with Qwen2.5-0.5B's shapes and 8,192 tokens at once: one layer's attention and its gradient, and the train
step (four layers of 24, since what a layer takes for a moment does not depend on their number; remat "full"). Prints a
table and writes it, with versions, to benchmarks/results/attention-PLATFORM.json.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks.memory import SPEC
from jaxlora.config.build import programs
from jaxlora.config.build.inputs import Model
from jaxlora.config.schema import Config
from jaxlora.models.attention import Attention, attention
from jaxlora.models.decoder import Decoder
from jaxlora.models.places import Places
from jaxlora.parallel.mesh import make_mesh
from jaxlora.runs.progress import Progress

TOKENS = 8192
LAYERS = 4


def layer(how: Attention, length: int, device: Any) -> jax.stages.Lowered:
    """The gradient of one layer's attention over rows of so many tokens."""
    rows, place = TOKENS // length, SingleDeviceSharding(device)
    heads = [(SPEC.num_heads,), (SPEC.num_kv_heads,), (SPEC.num_kv_heads,)]
    arrays = [
        jax.ShapeDtypeStruct((rows, length, *each, SPEC.head_dim), jnp.bfloat16, sharding=place)
        for each in heads
    ]
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=place)

    def loss(q: Any, k: Any, v: Any, places: Places) -> Any:
        return jnp.sum(attention(q, k, v, places, None, None, how))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays, Places(ids, ids))


def step(how: Attention, length: int, device: Any) -> jax.stages.Lowered:
    """The train step of four layers."""
    rows = TOKENS // length
    config = Config.from_dict(
        {
            "model": {"path": "Qwen/Qwen2.5-0.5B-Instruct"},
            "data": {"train": "none", "max_length": length},
            "train": {"batch_size": 2 * rows, "micro_batch_size": rows},
        }
    )
    spec = dataclasses.replace(SPEC, num_layers=LAYERS)
    decoder = Decoder(spec, dtype=jnp.bfloat16, attention=how)
    model = Model(None, spec, decoder, make_mesh((1, 1, 1), [device]))  # type: ignore[arg-type]
    return programs.lower_train(config, model, programs.state_shapes(config, model, steps=1000))


def temporaries(lowered: jax.stages.Lowered, model: Any) -> int | None:
    """Bytes of a program's temporaries; None where the compiler finds no way to place it."""
    (compiled,) = programs.compile_all(model, [lowered])
    memory: Any = None if compiled is None else compiled.memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", help="of TPU chips, such as v5e:2x4; without it the devices at hand")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="of a row")
    parser.add_argument("--programs", nargs="+", choices=("layer", "step"), default=["layer", "step"])
    parser.add_argument("--out", type=Path, help="the JSON file")
    arguments = parser.parse_args()
    if arguments.topology:
        from jax.experimental import topologies

        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        device: Any = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices[
            0
        ]
    else:
        device = jax.devices()[0]
    platform = device.platform
    kinds = ["plain", "blockwise", *(["splash"] if platform == "tpu" else [])]
    kinds += ["cudnn"] if platform == "gpu" else []
    on_one: Any = type("OnOne", (), {"mesh": make_mesh((1, 1, 1), [device])})
    found: dict[str, dict[str, dict[str, int | None]]] = {}
    with Progress(output=sys.stderr) as progress:
        for name in arguments.programs:
            for length in arguments.lengths:
                for kind in kinds:
                    with progress.stage(f"compiling the {name}, {kind}, rows of {length}"):
                        how = Attention(kind, platform)
                        size = temporaries({"layer": layer, "step": step}[name](how, length, device), on_one)
                    found.setdefault(name, {}).setdefault(str(length), {})[kind] = size
    print(f"temporaries in MB (1e6 bytes), {TOKENS:,} tokens at once, {device.device_kind}")
    print(f"| program | row | {' | '.join(kinds)} |")
    print("| --- " * (len(kinds) + 2) + "|")
    for name, lengths in found.items():
        for length, sizes in lengths.items():
            shown = [f"{size / 1e6:,.0f}" if size is not None else "does not fit" for size in sizes.values()]
            print(f"| {name} | {length} | {' | '.join(shown)} |")
    out = arguments.out or Path(__file__).parent / "results" / f"attention-{platform}.json"
    told = {
        "command": f"python -m benchmarks.attention{' --topology ' + arguments.topology if arguments.topology else ''}"
        f" --lengths {' '.join(map(str, arguments.lengths))} --programs {' '.join(arguments.programs)}",
        "device": device.device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "tokens": TOKENS,
        "temporaries": found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(told, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
