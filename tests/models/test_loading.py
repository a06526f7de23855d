"""What loading a base of 7B's shape takes of the host's memory, by benchmarks/loading.py with two of its layers."""

import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks import loading
from benchmarks.aot import MODELS
from jaxlora.runs.progress import Progress

LAYERS = 2  # all 28 are 15 GB, on disk and in memory


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_eight_devices_take_their_shards_and_little_more():
    with tempfile.TemporaryDirectory() as folder:  # pytest would keep its own, gigabytes each
        with Progress(output=sys.stderr) as progress:
            loading.write_model(Path(folder), MODELS["Qwen2.5-7B"] | {"num_hidden_layers": LAYERS}, progress)
        found = loading.loaded(Path(folder), (1, 8, 1))
    assert found["shards"] > 3e9
    assert 0.9 * found["shards"] < found["grown"]  # they were written to, all of them
    # The bound is for all layers; a second copy of what there is here, or of a stack of layers, would be over this one.
    assert found["grown"] < found["shards"] + loading.MARGIN / 4
