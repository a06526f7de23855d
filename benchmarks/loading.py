"""How much of the host's memory loading a base takes, beside the base itself, on simulated devices.

    python -m benchmarks.loading                         # Qwen2.5-7B's shape, 15 GB on disk and in memory
    python -m benchmarks.loading --layers 4 --mesh 1,4,2 # a part of it

Random bfloat16 weights are written to a folder in Hugging Face's format, and removed at the end. A process of its own
loads them as a run does; Linux says what its resident memory was at most. Simulated devices have the host's memory, so
all shards are in it. The result is added to benchmarks/results/loading.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.aot import MODELS
from benchmarks.report import RESULTS, keep, versions
from benchmarks.shapes import random_bits
from jaxlora.models.shards import write_shards
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import tensor_table
from jaxlora.runs.progress import Progress

MARGIN = 2 * 10**9
"""Bytes that loading may take beside the shards."""


def write_model(folder: Path, config: Mapping[str, Any], progress: Progress) -> None:
    """A model folder with random bfloat16 weights, of either sign and between 2^-7 and 2^-6."""
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {
        name: stored.stored_shape
        for stored in tensor_table(DecoderSpec.from_hf(config)).values()
        for name in stored.names
    }
    random = np.random.default_rng(0)

    def tensor(name: str) -> np.ndarray:
        return random_bits(random, shapes[name])

    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
    with progress.stage("writing random weights") as stage:
        write_shards(folder, sizes, tensor, max_shard_size=10**9, progress=stage)


def loaded(folder: Path, mesh: tuple[int, int, int]) -> dict[str, Any]:
    """Loads a model folder in a process of its own, on as many simulated devices as the mesh (data, fsdp, tensor) has.

    Returns:
        "shards": bytes of all devices' parts; "grown": how far resident memory rose above what it was before, at most;
        "seconds".
    """
    command = [
        sys.executable,
        "-m",
        "benchmarks.loading",
        "--child",
        str(folder),
        "--mesh",
        ",".join(map(str, mesh)),
    ]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={np.prod(mesh)}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(printed)


def _child(folder: str, mesh: tuple[int, int, int]) -> None:
    import jax

    from jaxlora.config.build import inputs
    from jaxlora.config.schema import Config

    def resident(name: str) -> int:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(status[name].split()[0])

    sizes = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    rows = {"batch_size": mesh[0] * mesh[1], "micro_batch_size": mesh[0] * mesh[1]}
    asked = {"model": {"path": folder}, "data": {"train": "none"}, "train": rows, "mesh": sizes}
    model = inputs.model(Config.from_dict(asked))
    jax.numpy.zeros(1).block_until_ready()  # the backend's own memory is not the loader's
    before, start = resident("VmRSS"), time.monotonic()
    with Progress(output=sys.stderr) as progress, progress.stage("loading the base") as stage:
        base = inputs.base(model, stage)
    seconds = time.monotonic() - start
    shards = sum(shard.data.nbytes for leaf in jax.tree.leaves(base) for shard in leaf.addressable_shards)
    print(json.dumps({"shards": shards, "grown": resident("VmHWM") - before, "seconds": round(seconds, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="Qwen2.5-7B")
    parser.add_argument("--layers", type=int, help="fewer than the model has, where disk or memory are short")
    parser.add_argument(
        "--mesh",
        type=lambda text: tuple(map(int, text.split(","))),
        default=(1, 8, 1),
        help="data,fsdp,tensor (1,8,1)",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "loading.json")
    arguments = parser.parse_args()
    if arguments.child:
        _child(arguments.child, arguments.mesh)
        return
    config = dict(MODELS[arguments.model])
    whole = config["num_hidden_layers"]
    config["num_hidden_layers"] = arguments.layers or whole
    with tempfile.TemporaryDirectory() as folder:
        with Progress(output=sys.stderr) as progress:
            write_model(Path(folder), config, progress)
        found = loaded(Path(folder), arguments.mesh)
    beside = found["grown"] - found["shards"]
    mesh = "x".join(map(str, arguments.mesh))
    name = f"{arguments.model}, {config['num_hidden_layers']} of {whole} layers, mesh {mesh}"
    print(
        f"{name}: shards {found['shards'] / 1e9:.2f} GB, at most {found['grown'] / 1e9:.2f} GB more resident memory: "
        f"{beside / 1e9:.2f} GB beside them ({found['seconds']} s)"
    )
    used = versions("jax", "safetensors", "numpy")
    told = found | {"beside": beside, "versions": used, "device": platform.processor() or "CPU"}
    keep(arguments.out, {name: told})
    sys.exit(beside > MARGIN)


if __name__ == "__main__":
    main()
