"""What the device can do at most, what our train step asks of it, and the share that is reached.

    python -m benchmarks.roofline
    python -m benchmarks.roofline --shapes 7B --rows 8 --length 2048       # one large GPU

Ceilings, in turn: products of a square of 4,096 and of the step's own shapes (its tokens times the widest projection),
with operands in the step's dtype and float32 results; and a copy of 256 MB, whose bytes are read and written.

The step: FLOPs of its matrix products by `jaxlora.models.flops`, which a test holds to be those of the traced step; and
bytes that its instructions read and write, from the compiled program's text, each loop's as often as it turns, with the
instructions that move most. Two shares of the matmul ceiling (the highest that was measured): of all that is computed;
and MFU, of 4 x base parameters x tokens and what attention and the adapter need, without credit for what the backward
pass computes a second time.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import commands, report, timing
from benchmarks.ours import OurStep, filled, random_base
from benchmarks.shapes import spec
from benchmarks.traffic import moved
from jaxlora.config.build import programs
from jaxlora.models import flops
from jaxlora.models.spec import DecoderSpec

COPIED = 256 * 10**6
SQUARE = 4096
LARGEST = 8  # of the instructions by bytes, told


def ceilings(shape: DecoderSpec, tokens: int, dtype: str, arguments: Namespace) -> dict[str, Any]:
    """FLOP/s of products, and bytes/s of a copy: spreads over the rounds."""
    square, copied = (256, 10**6) if arguments.toy else (SQUARE, COPIED)
    sizes = {
        f"{square} x {square} x {square}": (square, square, square),
        f"{tokens} x {shape.hidden_size} x {shape.intermediate_size}": (
            tokens, shape.hidden_size, shape.intermediate_size,
        ),
    }  # fmt: skip
    random = np.random.default_rng(0)

    def drawn(*size: int) -> Any:
        return jnp.asarray(random.standard_normal(size, np.float32), dtype)

    # Not one by one where starting a program takes as long as a part of it.
    together = 1 if jax.devices()[0].platform == "cpu" else 50

    def several(program: Callable[..., Any], *given: Any) -> None:
        for _ in range(together):
            last = program(*given)
        jax.block_until_ready(last)

    product = jax.jit(partial(jnp.einsum, "MK,KN->MN", preferred_element_type=jnp.float32))
    runs = {name: partial(several, product, drawn(m, k), drawn(k, n)) for name, (m, k, n) in sizes.items()}
    runs["copy"] = partial(several, jax.jit(lambda x: x + 1), jnp.zeros(copied // 4, jnp.float32))
    taken = timing.in_turn(runs, arguments.rounds)
    found = {
        name: timing.spread(together * 2.0 * m * k * n / s for s in taken[name])
        for name, (m, k, n) in sizes.items()
    }
    return {"products": found, "copy": timing.spread(together * 2.0 * copied / s for s in taken["copy"])}


def measure(name: str, remat: str, arguments: Namespace) -> dict[str, Any]:
    """Ceilings, the step's counts and times, and shares."""
    shape, rows, length = spec(name), arguments.rows, arguments.length
    ours = OurStep(shape, rows, length, arguments.dtype, remat, scan_layers=arguments.scan_layers)
    if ours.compiled is None:
        return {"failed": "the compiled step does not fit the device"}
    step = ours.starter(random_base(shape, arguments.dtype))
    batch = ours.put(filled(rows, length, shape.vocab_size))
    found = ceilings(shape, rows * length, arguments.dtype, arguments)
    (seconds,) = timing.in_turn(
        {"step": lambda: jax.block_until_ready(step(batch))}, arguments.rounds
    ).values()
    counted = flops.training(shape, programs.lora_spec(ours.config).ranks, rows, length, remat)
    by_name, memory = moved(ours.compiled.as_text() or ""), ours.compiled.memory_analysis()
    read = sum(by_name.values())
    ceiling = max(each["median"] for each in found["products"].values())
    return found | {
        "seconds": timing.spread(seconds),
        "tokens_per_second": timing.spread(rows * length / each for each in seconds),
        "flops": {**counted._asdict(), "total": counted.total, "model": counted.model},
        "bytes": read,
        "bytes_by_instruction": dict(list(by_name.items())[:LARGEST]),
        "temporaries": memory.temp_size_in_bytes if memory else None,
        "least_seconds": {"products": counted.total / ceiling, "bytes": read / found["copy"]["median"]},
        "share_computed": timing.spread(counted.total / each / ceiling for each in seconds),
        "mfu": timing.spread(counted.model / each / ceiling for each in seconds),
    }


def tell(title: str, found: Mapping[str, Any]) -> None:
    print(f"\n{title}")
    if "failed" in found:
        print(found["failed"])
        return
    rows = [
        (f"product {name}", timing.shown(one, 3, 1e12), "TFLOP/s") for name, one in found["products"].items()
    ]
    rows.append(("copy, read and written", timing.shown(found["copy"], 1, 1e9), "GB/s"))
    rows += [
        ("a step", timing.shown(found["seconds"], 1, 1e-3), "ms"),
        ("tokens/s", timing.shown(found["tokens_per_second"], 0), ""),
        ("its products", f"{found['flops']['total'] / 1e9:,.1f}", "GFLOP"),
        ("of them computed twice", f"{found['flops']['again'] / found['flops']['total']:.0%}", ""),
        ("bytes that its instructions name", f"{found['bytes'] / 1e6:,.1f}", "MB"),
        *((f"  {name}", f"{each / 1e6:,.1f}", "MB") for name, each in found["bytes_by_instruction"].items()),
        ("at the matmul ceiling it would take", f"{1e3 * found['least_seconds']['products']:,.1f}", "ms"),
        ("at the copy ceiling", f"{1e3 * found['least_seconds']['bytes']:,.1f}", "ms"),
        ("share of the ceiling, all that is computed", timing.shown(found["share_computed"], 1, 0.01), "%"),
        ("MFU, nothing counted twice", timing.shown(found["mfu"], 1, 0.01), "%"),
    ]
    report.table(("", "median (range)", ""), rows)


def main() -> None:
    parser = commands.parser(__doc__, rounds=5)
    commands.add_step(parser, "40M", "135M")
    arguments = commands.step_arguments(parser)
    told, where, results = report.Report("roofline", arguments), report.device(), {}
    for shape in arguments.shapes:
        for remat in arguments.remat:
            title = f"{shape}, {arguments.rows} x {arguments.length}, {arguments.dtype}, remat {remat}"
            results[title] = measure(shape, remat, arguments)
            tell(f"{title}, {where}", results[title])
    told.write(where, ("jax", "jaxlib", "flax"), results)


if __name__ == "__main__":
    main()
