"""A trial that was trained in a stack is the trial that was trained alone: curves, ends, adapters, files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora.config.build.trialing import alone
from jaxlora.train import fine_tune
from tests.sweeps.conftest import Swept, see_devices, trial

EIGHT = {
    "plain": {"optim__learning_rate": 1e-2},
    "rank2": {"lora__rank": 2, "lora__alpha": 3.0, "lora__scaling": "rslora", "optim__learning_rate": 3e-3},
    "rank8": {
        "lora__rank": 8,
        "optim__weight_decay": 0.5,
        "optim__b1": 0.8,
        "optim__b2": 0.95,
        "optim__eps": 1e-6,
        "log__every": 2,
    },
    "seed": {"seed": 5, "lora__dropout": 0.2, "optim__loraplus_lr_ratio": 4.0},
    "longer": {
        "train__max_steps": 11,
        "optim__warmup_steps": 4,
        "optim__final_fraction": 0.1,
        "eval__every": 4,
        "checkpoint__every": 5,
        "checkpoint__best": 2,
    },
    "diverges": {"optim__learning_rate": 1e20, "optim__warmup_steps": 0},
    "stops": {
        "optim__learning_rate": 3e-3,
        "train__max_steps": 12,
        "eval__every": 1,
        "stop__patience": 2,
        "stop__min_delta": 1.0,
    },
    "epochs": {
        "train__max_steps": 0,
        "train__epochs": 1.5,
        "optim__label_smoothing": 0.1,
        "optim__clip_norm": 0.0,
        "optim__warmup_steps": 1,
        "lora__rank_pattern": ("q_proj=3", "mlp.*=5"),
        "lora__dropout_pattern": ("v_proj=0.3",),
        "guard__on_spike": "skip",
        "guard__on_nonfinite": "skip",
    },
}


@pytest.fixture(scope="module")
def both(base_config, tmp_path_factory):
    """(the sweep's folder, the folder of the runs alone), of all eight."""
    folder = tmp_path_factory.mktemp("both")
    trials = [trial(base_config, name, **changes) for name, changes in EIGHT.items()]
    with see_devices(1):
        swept = Swept(trials, folder / "sweep")
        for one in trials:
            assert fine_tune(alone(one.config), folder / "alone" / one.name, "tiny.py") == 0
    return swept, folder / "alone"


def read(run: Path) -> dict:
    return json.loads((run / "record.json").read_text())


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def near(one: object, other: object) -> bool:
    """Whether numbers are equal within 1e-5 of their size, wherever they stand."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(near(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-7)
    return one == other


def assert_same_curves(found: Path, expected: Path) -> None:
    assert [line["step"] for line in lines(found)] == [line["step"] for line in lines(expected)]
    for line, expectation in zip(lines(found), lines(expected), strict=True):
        assert line.keys() == expectation.keys()
        for key in line:
            if key != "train/tokens_per_second":
                assert near(line[key], expectation[key]), (line["step"], key, line[key], expectation[key])


def assert_same_adapters(found: Path, expected: Path) -> None:
    for adapter in ("best", "last"):
        one, other = (load_file(run / adapter / "adapter_model.safetensors") for run in (found, expected))
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].shape == other[key].shape
            np.testing.assert_allclose(one[key], other[key], rtol=1e-4, atol=1e-4, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGHT)
def test_curves_and_ends(both, name):
    swept, folder = both
    found, expected = swept.folder / name, folder / name
    one, other = read(found), read(expected)
    assert (one["status"], one["steps"]) == (other["status"], other["steps"])
    assert one["status"] == {"diverges": "diverged", "stops": "stopped_early"}.get(name, "finished")
    for key in ("best", "last", "first"):
        assert near(one[key], other[key]), (one[key], other[key])
    assert_same_curves(found, expected)


@pytest.mark.slow
def test_trials_over_a_base_in_four_bits(base_config, tmp_path):
    """And next to one over the base as it is, and one over its embeddings in four bits, which are other bases."""
    trials = [
        trial(
            base_config,
            name,
            model__quantize=kind,
            model__quantize_embeddings=tables,
            optim__learning_rate=rate,
        )
        for name, kind, tables, rate in (
            ("a", "nf4", "none", 1e-2),
            ("b", "nf4", "none", 3e-3),
            ("c", "none", "none", 1e-2),
            ("d", "none", "nf4", 1e-2),
            ("e", "none", "nf4", 3e-3),
        )
    ]
    with see_devices(1):
        Swept(trials, tmp_path / "sweep")
        for i, name in ((1, "b"), (4, "e")):
            assert fine_tune(alone(trials[i].config), tmp_path / "alone" / name, "tiny.py") == 0
    ends = {name: read(tmp_path / "sweep" / name)["best"]["eval/nll"] for name in "abcde"}
    for name in "be":
        assert near(ends[name], read(tmp_path / "alone" / name)["best"]["eval/nll"])
    assert len(set(ends.values())) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGHT)
def test_adapters_and_files(both, name):
    swept, folder = both
    found, expected = swept.folder / name, folder / name
    files = {
        str(file.relative_to(expected)) for file in expected.rglob("*") if file.suffix in (".json", ".jsonl")
    }
    assert files == {
        str(file.relative_to(found)) for file in found.rglob("*") if file.suffix in (".json", ".jsonl")
    }
    assert (found / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    assert_same_adapters(found, expected)
