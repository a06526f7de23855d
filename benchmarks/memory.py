"""What a run of Qwen2.5-0.5B holds in memory, as the compiler says, from shapes alone (no weights, nothing is run):

    python -m benchmarks.memory

Prints a table and writes it, with versions and device, to benchmarks/results/memory-PLATFORM.json.
"""

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import RESULTS, facts, write
from benchmarks.shapes import spec
from jaxlora.config.build import memory, programs, works
from jaxlora.config.build.inputs import Model
from jaxlora.config.schema import Config
from jaxlora.data.chat import ChatEncoder
from jaxlora.models.decoder import Decoder, unembedding
from jaxlora.parallel.mesh import make_mesh
from jaxlora.runs.progress import Progress
from jaxlora.training.answers import Answers
from jaxlora.training.losses import cross_entropy

SPEC = spec("0.5B")
NEW_TOKENS = 256


class Prompts(ChatEncoder):
    """Prompts of one length, without a tokenizer."""

    end_of_turn_ids = (0,)  # pyright: ignore[reportAssignmentType]

    def __init__(self, length: int):
        self.tokenizer: Any = types.SimpleNamespace()
        self._length = length

    def encode_prompt(self, messages: Any) -> np.ndarray:
        return np.zeros(self._length, np.int32)


def measure(rows: int, length: int) -> dict[str, dict[str, int]]:
    """Bytes by program: of its arguments, outputs, temporaries, aliased outputs; in all, and with what lives beside."""
    config = Config.from_dict(
        {
            "model": {"path": "Qwen/Qwen2.5-0.5B-Instruct"},
            "data": {"train": "none", "max_length": length},
            "train": {"batch_size": 16 * rows, "micro_batch_size": rows},
            "eval": {"batch_size": rows, "max_new_tokens": NEW_TOKENS},
            "mesh": {"memory_gb": 1e6},  # nothing is refused
        }
    )
    decoder = Decoder(SPEC, remat=config.model.remat, dtype=jnp.dtype(config.model.dtype))
    model = Model(None, SPEC, decoder, make_mesh((1, 1, 1), jax.devices()[:1]))  # type: ignore[arg-type]
    state = programs.state_shapes(config, model, steps=1000)
    talk: Any = [[{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]]
    answers = Answers(
        decoder,
        Prompts(length - NEW_TOKENS + 1),
        talk,
        max_new_tokens=NEW_TOKENS,
        batch_size=rows,
        mesh=model.mesh,
    )
    with Progress(output=sys.stderr) as progress:
        with progress.stage("compiling training, evaluation and answers"):
            fitted = memory.fit(config, model, state, answers, progress)
        with progress.stage("compiling the forward pass and the loss alone"):
            alone = _loss_alone(config, model, programs.lora_shapes(model, state))
    compiled = {
        "training": fitted.programs.train,
        "the forward pass and the loss alone": alone,
        "evaluation": fitted.programs.evaluate,
        "answers": fitted.answers._program if fitted.answers else None,
    }
    return {name: _bytes(program) | _with_all(fitted.needs.get(name)) for name, program in compiled.items()}


def _loss_alone(config: Config, model: Model, lora: Any) -> Any:
    def loss(lora: Any, base: Any, batch: Any) -> Any:
        hidden: Any = model.decoder.apply(
            {"params": base, "lora": lora}, batch["tokens"], batch["positions"], batch["segments"]
        )
        return cross_entropy(hidden, unembedding(base), batch["targets"], batch["weights"])[0]

    batch = programs.batch_shapes(config, model.mesh, config.eval.batch_size)
    (compiled,) = programs.compile_all(model, [jax.jit(loss).lower(lora, model.shapes(), batch)])
    return compiled


def _bytes(program: Any) -> dict[str, int]:
    found = program.memory_analysis()
    kinds = {"arguments": "argument", "outputs": "output", "temporaries": "temp", "aliased": "alias"}
    parts = {name: getattr(found, f"{kind}_size_in_bytes") for name, kind in kinds.items()}
    return parts | {"in_all": works.needed(program)}


def _with_all(need: int | None) -> dict[str, int]:
    return {} if need is None else {"with_what_lives_beside": need}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8, help="computed at once, everywhere (8)")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a row (1024)")
    parser.add_argument("--out", type=Path, help="the JSON file")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    found = measure(arguments.rows, arguments.length)
    columns = ("arguments", "outputs", "temporaries", "aliased", "in_all", "with_what_lives_beside")
    print(f"Qwen2.5-0.5B, {arguments.rows} rows of {arguments.length}, {device.device_kind}; GB (1e9 bytes)")
    print("| | " + " | ".join(name.replace("_", " ") for name in columns) + " |")
    print("| --- " * (len(columns) + 1) + "|")
    for name, sizes in found.items():
        print(
            f"| {name} | " + " | ".join(f"{sizes[c] / 1e9:.3f}" if c in sizes else "" for c in columns) + " |"
        )
    command = f"python -m benchmarks.memory --rows {arguments.rows} --length {arguments.length}"
    told = facts(command, device.device_kind, "jax", "jaxlib", "flax", "optax")
    write(arguments.out or RESULTS / f"memory-{device.platform}.json", told | {"bytes": found})


if __name__ == "__main__":
    main()
