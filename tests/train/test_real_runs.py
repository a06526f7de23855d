"""The command at the size it is made for: Qwen2.5-0.5B's shape, and a real fine-tune of SmolLM2-135M."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import tensor_table

DRIVER = """
import resource, sys
from jaxlora import train
try:
    code = train.main(sys.argv[1:])
finally:
    print("peak bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def write_random_weights(file: Path, config: dict[str, Any]) -> None:
    """A safetensors file of random bfloat16 tensors, written one at a time."""
    draw = np.random.default_rng(0)
    shapes = {
        name: stored.stored_shape
        for stored in tensor_table(DecoderSpec.from_hf(config)).values()
        for name in stored.names
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shapes.items():
            mean, deviation = (1.0, 0.0) if "norm" in name else (0.0, 0.02)
            values = mean + deviation * draw.standard_normal(shape, dtype=np.float32)
            stream.write(values.astype(ml_dtypes.bfloat16).tobytes())


def run(project, tmp_path: Path, record_property, **settings: Any) -> tuple[str, int]:
    """Runs the command in a process of its own on one device: (what it prints, its peak resident bytes)."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    arguments = project.arguments(tmp_path / "run", **settings)
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    peak = int(ended.stdout.rpartition("peak bytes ")[2])
    record_property("seconds", round(time.monotonic() - began))
    record_property("peak_gb", round(peak / 1e9, 2))
    return ended.stdout, peak


@pytest.mark.slow
def test_qwen_half_a_billion_in_8_gb(real, project, tmp_path, record_property):
    """Loads and takes 3 steps of 4 x 256 tokens, and evaluates twice, within 8 GB."""
    model = tmp_path / "model"
    shutil.copytree(real / "tokenizers/qwen2.5", model)
    shutil.copy(real / "configs/Qwen2.5-0.5B-Instruct.config.json", model / "config.json")
    write_random_weights(model / "model.safetensors", json.loads((model / "config.json").read_text()))
    _, peak = run(
        project, tmp_path, record_property,
        model__path=model, model__dtype="bfloat16", model__remat="full", lora__rank=16, data__max_length=256,
        data__train=real / "data/gsm8k/train.jsonl", data__eval=real / "data/gsm8k/test.jsonl",
        train__batch_size=4, train__micro_batch_size=4, train__max_steps=3, eval__max_examples=4,
        eval__batch_size=4,
    )  # fmt: skip
    assert peak < 8e9
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["train/nll"] for line in lines if "train/nll" in line]
    # Random weights know nothing: the mean over 151,936 words is near the logarithm of their number.
    assert len(losses) == 3
    assert all(abs(loss - np.log(151_936)) < 1 for loss in losses)


@pytest.mark.slow
def test_smollm2_learns_gsm8k(real, smollm2, project, tmp_path, record_property):
    """20 steps of 8 x 256 tokens: eval/nll falls clearly below the base's."""
    output, _ = run(
        project, tmp_path, record_property,
        model__path=smollm2, model__dtype="bfloat16", lora__rank=16, lora__alpha=32, data__max_length=256,
        data__train=real / "data/gsm8k/train.jsonl", data__eval=real / "data/gsm8k/test.jsonl",
        optim__learning_rate=5e-4, optim__warmup_steps=2, train__max_steps=20, eval__every=20,
        eval__max_examples=32,
    )  # fmt: skip
    record = json.loads((tmp_path / "run/record.json").read_text())
    record_property("eval_nll", (record["first"]["eval/nll"], record["best"]["eval/nll"]))
    assert record["status"] == "finished", output
    assert record["best"]["step"] == 20
    assert record["best"]["eval/nll"] < record["first"]["eval/nll"] - 0.1
