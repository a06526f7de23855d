"""What the loss over a large vocabulary takes, with its gradient, alone: time and memory by vocabulary.

    python -m benchmarks.loss
    python -m benchmarks.loss --vocabularies 151936 --tokens 2048 --hidden 896

The sides, in turn in one process, each compiled, each handing out the loss and its gradient in the hidden states:

    chunked   ours: chunks of 128 tokens (GPU 1024, TPU 512), the gradient made in the pass that makes the loss
    remat     the same chunks under jax.checkpoint: the backward pass makes their logits a second time
    dense     all logits at once in float32, and autodiff
    Liger     its fused loss, on a GPU where it is installed: pip install liger-kernel torch==2.13.0
    bare      the two matrix products that any of them needs, and nothing else: all at once, or in chunks

Temporaries are what the compiler says (of Liger: what torch allocated above its arguments). The ratio of time is to
the faster of the bare products, round by round.
"""

import functools
import os
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

# Liger shares the GPU with JAX, which would else take most of it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import commands, report, timing
from jaxlora.core.compilation import compiler_options
from jaxlora.training.losses import Chunks, chunks_for, cross_entropy

VOCABULARIES = (32_768, 49_152, 151_936)


@functools.cache
def chunks() -> Chunks:
    """How the device at hand takes the tokens."""
    return chunks_for(jax.devices()[0].platform)


def in_chunks(one: Callable[[Any, Any], Any], hidden: Any, targets: Any) -> Any:
    """Scans `one(hidden [C, D], targets [C])` over chunks of tokens; stacks what it hands out."""
    chunk = min(chunks().size, len(hidden))
    pieces = hidden.reshape(-1, chunk, hidden.shape[1]), targets.reshape(-1, chunk)
    return jax.lax.scan(lambda carry, piece: (carry, one(*piece)), None, pieces)[1]


def nll(hidden: Any, head: Any, targets: Any) -> Any:
    """The summed loss from all logits [N, V], and each token's."""
    logits = jnp.einsum("ND,VD->NV", hidden, head, preferred_element_type=jnp.float32)
    right = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    each = jax.nn.logsumexp(logits, axis=1) - right
    return jnp.sum(each), each


def chunked(hidden: Any, head: Any, targets: Any) -> Any:
    weights = jnp.ones_like(targets, jnp.float32)[None]
    return cross_entropy(
        hidden[None], head, targets[None], weights, chunk=chunks().size, one_pass=chunks().one_pass
    )


def remat(hidden: Any, head: Any, targets: Any) -> Any:
    sums, each = in_chunks(jax.checkpoint(lambda h, y: nll(h, head, y)), hidden, targets)
    return jnp.sum(sums), each


def products(hidden: Any, head: Any, targets: Any) -> Any:
    """Logits, and their product with the head: shaped as the loss and its gradient are."""
    logits = jnp.einsum("ND,VD->NV", hidden, head, preferred_element_type=jnp.float32).astype(hidden.dtype)
    return jnp.einsum("NV,VD->ND", logits, head, preferred_element_type=jnp.float32).astype(hidden.dtype)


def products_in_chunks(hidden: Any, head: Any, targets: Any) -> Any:
    return in_chunks(lambda h, y: products(h, head, y), hidden, targets)


LOSSES = {"chunked": chunked, "remat": remat, "dense": nll}
BARE = {"bare, all at once": products, "bare, in chunks": products_in_chunks}


def liger(
    hidden: np.ndarray, head: np.ndarray, targets: np.ndarray
) -> tuple[Callable[[], None], Callable[[], int]]:
    """A round of Liger's fused loss on the GPU, and the bytes that it allocated at most."""
    import torch
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore

    h, w = (torch.tensor(x, device="cuda", dtype=torch.bfloat16) for x in (hidden, head))
    y, loss = (
        torch.tensor(targets, device="cuda", dtype=torch.int64),
        LigerFusedLinearCrossEntropyLoss(reduction="sum"),
    )
    h.requires_grad_()
    before = torch.cuda.memory_allocated()

    def run() -> None:
        h.grad = None
        loss(w, h, y).backward()
        torch.cuda.synchronize()

    return run, lambda: torch.cuda.max_memory_allocated() - before


def measure(vocabulary: int, tokens: int, width: int, dtype: str, arguments: Namespace) -> dict[str, Any]:
    """By side: seconds of each round, and bytes of temporaries."""
    random, device = np.random.default_rng(0), jax.devices()[0]
    host = (
        random.standard_normal((tokens, width), np.float32),
        0.02 * random.standard_normal((vocabulary, width), np.float32),
    )
    targets = random.integers(0, vocabulary, tokens).astype(np.int32)
    given = (*(jnp.asarray(x, dtype) for x in host), jnp.asarray(targets))
    functions = {name: jax.value_and_grad(function, has_aux=True) for name, function in LOSSES.items()} | BARE
    runs: dict[str, Callable[[], Any]] = {}
    temporaries: dict[str, Callable[[], int | None]] = {}

    def result(program: Any) -> Any:
        return jax.block_until_ready(program(*given))

    def size(program: Any) -> int | None:
        memory = program.memory_analysis()
        return memory.temp_size_in_bytes if memory else None

    losses, options = {}, compiler_options(device.platform)
    for name, function in functions.items():
        program = jax.jit(function, compiler_options=options).lower(*given).compile()
        runs[name], temporaries[name] = partial(result, program), partial(size, program)
        if name in LOSSES:
            losses[name] = float(runs[name]()[0][0])
    assert max(losses.values()) - min(losses.values()) < 1e-3 * losses["dense"], losses
    if device.platform == "gpu" and not commands.absent(torch="torch", liger_kernel="liger-kernel"):
        runs["Liger"], temporaries["Liger"] = liger(*host, targets)
    taken = timing.in_turn(runs, arguments.rounds)
    bare = min(BARE, key=lambda name: timing.spread(taken[name])["median"])
    return {
        name: {
            "seconds": timing.spread(seconds),
            "to_bare": timing.ratios(seconds, taken[bare]),
            "temporaries": temporaries[name](),
        }
        for name, seconds in taken.items()
    }


def main() -> None:
    parser = commands.parser(__doc__, rounds=7)
    parser.add_argument("--vocabularies", type=commands.positive, nargs="+", default=[*VOCABULARIES])
    parser.add_argument(
        "--tokens", type=commands.positive, default=2048, help="a multiple of the chunk (2048)"
    )
    parser.add_argument(
        "--hidden", type=commands.positive, default=896, help="width of the hidden states (896)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.vocabularies, arguments.tokens, arguments.hidden = [300], 2 * chunks().size, 32
    if arguments.tokens % chunks().size:
        parser.error(
            f"--tokens {arguments.tokens} must be a multiple of {chunks().size}, so that all chunks are full"
        )
    told, where = report.Report("loss", arguments), report.device()
    missing = commands.absent(torch="torch==2.13.0", liger_kernel="liger-kernel")
    if jax.devices()[0].platform != "gpu":
        missing = "runs on a GPU alone, so not measured"
    if missing:
        print(f"Liger: {missing}", flush=True)
    results = {}
    for vocabulary in arguments.vocabularies:
        found = measure(vocabulary, arguments.tokens, arguments.hidden, arguments.dtype, arguments)
        results[str(vocabulary)] = found
        dense = found["dense"]["temporaries"]
        what = f"{arguments.tokens} x {arguments.hidden} hidden states, {vocabulary:,} words"
        print(f"\n{what}, {arguments.dtype}, {where}")
        report.table(
            ("", "ms", "times the bare products", "temporaries, MB", "of dense"),
            [
                (
                    name,
                    timing.shown(one["seconds"], 1, 1e-3),
                    timing.shown(one["to_bare"]),
                    *(
                        (f"{one['temporaries'] / 1e6:,.1f}", f"{one['temporaries'] / dense:.1%}")
                        if dense and one["temporaries"] is not None
                        else ("", "")
                    ),
                )
                for name, one in found.items()
            ],
        )
    told.write(
        where,
        ("jax", "jaxlib", "torch", "liger-kernel"),
        results,
        tokens=arguments.tokens,
        hidden=arguments.hidden,
        dtype=arguments.dtype,
    )


if __name__ == "__main__":
    main()
