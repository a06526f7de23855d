"""What attention takes in memory, by kind and length of a row, as the compiler says; no weights are needed:

    python -m benchmarks.attention                        # for the devices at hand
    python -m benchmarks.attention --topology v5e:2x4     # for one such TPU chip; needs libtpu, no TPU
    python -m benchmarks.attention --run                  # runs one layer on the device at hand: errors and times

Two programs, with Qwen2.5-0.5B's shapes and 8,192 tokens at once: one layer's attention and its gradient, and the train
step (four layers of 24, since what a layer takes for a moment does not depend on their number; remat "full"). Prints a
table and writes it, with versions, to benchmarks/results/attention-PLATFORM.json. With --run (and --toy): one layer is
run, each kind in turn, on rows of one example and on packed rows of two examples and padding; times and errors.
"""

import argparse
import dataclasses
import os
import sys
import types
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks import commands, report, timing
from benchmarks.shapes import spec
from jaxlora.config.build import programs
from jaxlora.config.build.inputs import Model, attention_platform, by_example
from jaxlora.config.schema import Config
from jaxlora.models.attention import Attention, attention
from jaxlora.models.decoder import Decoder
from jaxlora.models.places import Places
from jaxlora.parallel.mesh import make_mesh
from jaxlora.runs.progress import Progress

SPEC = spec("0.5B")
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
    ids: Any = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=place)

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


@partial(jax.jit, static_argnums=0)
def compute(how: Attention, arrays: list[Any], places: Places) -> Any:
    """Output and gradients of q, k and v; arrays are these and what the output is weighted with."""

    def loss(q: Any, k: Any, v: Any) -> Any:
        out = attention(q, k, v, places, None, None, how)
        out = jnp.where((places.segments > 0)[:, :, None, None], out, 0.0)
        return jnp.sum(out * arrays[3]), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*arrays[:3])
    return out, *gradients


BY_EXAMPLE = "cudnn, by example"
LAYOUTS = {"one example": ((1, 1.0),), "packed": ((1, 1 / 2), (2, 3 / 8), (0, 1 / 8))}
"""Of a row: (segment, share of its positions); 0 is padding."""


def run(
    length: int, layout: str, kinds: list[str], platform: str, tokens: int, rounds: int
) -> dict[str, Any]:
    """Runs one layer's attention with its gradients over rows of so many tokens, each kind in turn.

    Returns:
        By kind: "seconds"; "errors" of output, q, k and v against the float32 formula (relative, root mean square),
        of the first row alone.
    """
    rng, rows = np.random.default_rng(0), tokens // length
    heads = (SPEC.num_heads, SPEC.num_kv_heads, SPEC.num_kv_heads, SPEC.num_heads)
    wide = [jnp.asarray(rng.normal(size=(rows, length, n, SPEC.head_dim)), jnp.float32) for n in heads]
    parts = [(segment, int(share * length)) for segment, share in LAYOUTS[layout]]
    ids = [np.concatenate([np.full(n, segment) for segment, n in parts])]
    ids.append(np.concatenate([np.arange(n) for _, n in parts]))
    segments, positions = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), (rows, length)) for x in ids)
    first, places = Places(positions[:1], segments[:1]), Places(positions, segments)
    exact = compute(Attention("plain", platform), [x[:1] for x in wide], first)
    narrow = [x.astype(jnp.bfloat16) for x in wide]
    hows = {kind: Attention(kind, platform) for kind in kinds}
    if by_example(jax.devices()[0]):
        hows[BY_EXAMPLE] = Attention("cudnn", platform, stretches=len(parts) + 1)
    errors = {
        kind: [
            float(jnp.sqrt(jnp.mean((x.astype(jnp.float32) - y) ** 2) / jnp.mean(y**2)))
            for x, y in zip(compute(how, [x[:1] for x in narrow], first), exact, strict=True)
        ]
        for kind, how in hows.items()
    }
    taken = timing.in_turn(
        {
            kind: partial(lambda how: jax.block_until_ready(compute(how, narrow, places)), how)
            for kind, how in hows.items()
        },
        rounds,
    )
    return {kind: {"seconds": timing.spread(taken[kind]), "errors": errors[kind]} for kind in hows}


def run_all(kinds: list[str], platform: str, arguments: argparse.Namespace) -> None:
    """Every length and layout; prints a table and writes it."""
    tokens, lengths = (256, [64]) if arguments.toy else (TOKENS, arguments.lengths)
    file, found = report.Report("attention", arguments), {}
    for layout in LAYOUTS:
        for length in lengths:
            found.setdefault(layout, {})[str(length)] = run(
                length, layout, kinds, platform, tokens, arguments.rounds
            )
    kinds = list(found["packed"][str(lengths[0])])
    print(f"one layer with its gradients, {tokens:,} tokens at once, {report.device()}; milliseconds")
    report.table(
        ("", "row", *kinds),
        [
            (layout, length, *(timing.shown(one["seconds"], 2, 1e-3) for one in each.values()))
            for layout, by_length in found.items()
            for length, each in by_length.items()
        ],
    )
    worst = {
        kind: max(max(each[kind]["errors"]) for lengths in found.values() for each in lengths.values())
        for kind in kinds
    }
    print("largest error: " + ", ".join(f"{kind} {error:.5f}" for kind, error in worst.items()))
    file.write(report.device(), ("jax", "jaxlib", "flax"), found, suffix="-run", tokens=tokens)


def main() -> None:
    parser = commands.parser(__doc__, rounds=10)
    parser.add_argument("--topology", help="of TPU chips, such as v5e:2x4; without it the devices at hand")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="of a row")
    parser.add_argument("--programs", nargs="+", choices=("layer", "step"), default=["layer", "step"])
    parser.add_argument("--run", action="store_true", help="run one layer instead, on the device at hand")
    arguments = parser.parse_args()
    for length in arguments.lengths:
        if length < 8 or TOKENS % length:
            parser.error(
                f"--lengths {length} must divide {TOKENS:,}, the tokens computed at once, and be 8 at least"
            )
    if arguments.topology:
        from jax.experimental import topologies

        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        device: Any = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices[
            0
        ]
    else:
        device = jax.devices()[0]
    platform = attention_platform(device)
    kinds = [
        kind
        for kind in ("plain", "blockwise", "sparse", "splash", "cudnn")
        if Attention(kind, platform).refusal(SPEC.head_dim, jnp.bfloat16) is None
    ]
    if arguments.run or arguments.toy:
        run_all(kinds, platform, arguments)
        return
    on_one: Any = types.SimpleNamespace(mesh=make_mesh((1, 1, 1), [device]))
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
    told = report.facts(
        f"python -m benchmarks.attention{' --topology ' + arguments.topology if arguments.topology else ''}"
        f" --lengths {' '.join(map(str, arguments.lengths))} --programs {' '.join(arguments.programs)}",
        device.device_kind,
        "jax", "jaxlib", "flax",
    )  # fmt: skip
    out = arguments.out or report.RESULTS / f"attention-{platform}.json"
    report.write(out, told | {"tokens": TOKENS, "temporaries": found})


if __name__ == "__main__":
    main()
