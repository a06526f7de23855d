"""What 7B models take of TPUs that are not there, as libtpu compiles them: memory, collectives, time of compilation.

    python -m benchmarks.aot                      # all cases; about an hour on two cores
    python -m benchmarks.aot --only fits,small    # some; the others keep what they had in benchmarks/results/aot.json

Shapes alone: no weights, no TPU. It needs libtpu: pip install "jax[tpu]". The tables go to docs/plan.md by hand.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, versions, write
from benchmarks.shapes import SHAPES
from jaxlora.config.schema import Config
from jaxlora.parallel import topology
from jaxlora.runs.progress import Progress

MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": SHAPES["0.5B"],
    "Qwen2.5-7B": SHAPES["7B"],
    # huggingface.co/mistralai/Mistral-7B-Instruct-v0.3
    "Mistral-7B": {
        "model_type": "mistral", "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 32_768,
        "vocab_size": 32_768, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None, "tie_word_embeddings": False,
    },
}  # fmt: skip
RANK = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a topology: mesh is (data, fsdp, tensor); rows of a micro-batch and of a step, tokens in a row."""

    model: str
    topology: str
    mesh: tuple[int, int, int]
    micro: int
    batch: int = 128
    length: int = 2048
    layers: int | None = None
    rank: int = RANK
    quantize: str = "none"
    quantize_embeddings: str = "none"

    @property
    def name(self) -> str:
        layers = "" if self.layers is None else f", {self.layers} layers"
        rank = "" if self.rank == RANK else f", rank {self.rank}"
        kept = "" if self.quantize == "none" else f" in {self.quantize}"
        kept += "" if self.quantize_embeddings == "none" else f", embeddings in {self.quantize_embeddings}"
        mesh = "x".join(map(str, self.mesh))
        rows = f"{self.micro} of {self.batch} x {self.length}"
        return f"{self.model}{kept}{layers}{rank}, {self.topology}, mesh {mesh}, {rows}"


EIGHT = Case("Qwen2.5-7B", "v5e:2x4", (1, 8, 1), 8)
CASES: dict[str, list[Case]] = {
    "layers": [dataclasses.replace(EIGHT, layers=layers) for layers in (7, 14, 28)],
    "fits": [
        EIGHT,
        Case("Mistral-7B", "v5e:2x4", (1, 8, 1), 8),
        Case("Qwen2.5-7B", "v4:2x2x1", (1, 4, 1), 8),
        Case("Mistral-7B", "v4:2x2x1", (1, 4, 1), 8),
    ],
    "small": [Case("Qwen2.5-0.5B", "v5e:1x1", (1, 1, 1), 8, length=1024)],
    "quantised": [
        Case(model, "v5e:1x1", (1, 1, 1), 1, batch=16, rank=16, quantize=kind, quantize_embeddings=tables)
        for model, kind, tables in (
            ("Mistral-7B", "nf4", "none"),
            ("Qwen2.5-7B", "nf4", "none"),
            ("Qwen2.5-7B", "nf4", "int8"),
            ("Qwen2.5-7B", "nf4", "nf4"),
            ("Mistral-7B", "int8", "none"),
        )
    ],
    "cut": [
        Case("Mistral-7B", topology, (1, n, 1), n, batch=16 * n, layers=4, rank=16, quantize=kind)
        for topology, n in (("v5e:1x1", 1), ("v5e:2x4", 8))
        for kind in ("none", "nf4")
    ],
    # The same 16 rows a chip in a step, one of them at once.
    "scaled": [EIGHT, Case("Qwen2.5-7B", "v5e:16x16", (32, 8, 1), 256, batch=16 * 256)],
    "launch": [
        Case("Qwen2.5-7B", topology, (1, chips, 1), 8, length=1024, rank=16)  # configs/qwen7b.py
        for topology, chips in (("v5e:2x4", 8), ("v6e:2x4", 8), ("v4:2x2x1", 4), ("v5p:2x2x1", 4))
    ],
}
"""By what they show: time of compilation, memory, memory of a small model, that of large ones in fewer bits, what fewer
bits change on one chip and over eight, bytes sent from 8 to 256 chips, and what the machines of launch/ need."""


def config_of(case: Case, folder: Path) -> Config:
    """A config whose model is a folder with a config.json alone."""
    given = MODELS[case.model]
    given = given if case.layers is None else {**given, "num_hidden_layers": case.layers}
    (folder / "config.json").write_text(json.dumps(given))
    return Config.from_dict(
        {
            "model": {
                "path": str(folder),
                "quantize": case.quantize,
                "quantize_embeddings": case.quantize_embeddings,
            },
            "lora": {"rank": case.rank, "alpha": float(case.rank)},
            "data": {"train": "none", "max_length": case.length},
            "train": {"batch_size": case.batch, "micro_batch_size": case.micro},
            "eval": {"batch_size": case.micro},
            "mesh": dict(zip(("data", "fsdp", "tensor"), case.mesh, strict=True)),
        }
    )


def planned(case: Case, config: Config, progress: Progress, search: bool) -> dict[str, Any]:
    """The whole plan, with the largest micro-batch that fits where that is looked for."""
    from jaxlora.config.build.compileplan import compile_plan

    return compile_plan(config, topology.devices(case.topology), progress, search).json()


def train_step(case: Case, config: Config, progress: Progress, search: bool) -> dict[str, Any]:
    """The train step alone: time of compilation (CPU seconds of all threads too), bytes of memory, bytes sent."""
    from jaxlora.config.build import inputs, programs, works
    from jaxlora.parallel.collectives import collectives, totals

    model = inputs.model(config, weights=False, devices=topology.devices(case.topology))
    state = programs.state_shapes(config, model, steps=1000)
    with progress.stage("compiling the train step"):
        wall, busy = time.monotonic(), time.process_time()
        (compiled,) = programs.compile_all(model, [programs.lower_train(config, model, state)])
        wall, busy = time.monotonic() - wall, time.process_time() - busy
    found: dict[str, Any] = {"seconds": round(wall, 1), "cpu_seconds": round(busy, 1)}
    if compiled is not None:
        hlo = compiled.as_text() or ""
        found |= {
            "needed": works.needed(compiled),
            "hlo_lines": hlo.count("\n"),
            "collectives": totals(collectives(hlo)),
        }
    return found


KINDS: dict[str, Callable[[Case, Config, Progress, bool], dict[str, Any]]] = {
    "layers": train_step,
    "fits": planned,
    "small": planned,
    "quantised": planned,
    "cut": train_step,
    "scaled": train_step,
    "launch": train_step,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(CASES), help=f"some of {', '.join(CASES)}")
    parser.add_argument("--match", default="", help="only cases whose name has this in it")
    parser.add_argument(
        "--no-search", dest="search", action="store_false", help="do not look for the largest micro-batch"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "aot.json")
    arguments = parser.parse_args()
    topology.prepare_environment()
    told: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    used = versions("jax", "jaxlib", "libtpu", "flax", "optax")
    with Progress(output=sys.stderr) as progress:
        for kind in arguments.only.split(","):
            for case in (case for case in CASES[kind] if arguments.match in case.name):
                progress.say(f"{kind}: {case.name}")
                with tempfile.TemporaryDirectory() as folder:
                    found = KINDS[kind](case, config_of(case, Path(folder)), progress, arguments.search)
                told.setdefault(kind, {})[case.name] = {"versions": used, **found}
                write(arguments.out, told)


if __name__ == "__main__":
    main()
