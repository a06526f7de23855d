"""Trials spread over a mesh axis come to the same numbers as on one device."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora.config.schema import Config, to_dict
from jaxlora.core.errors import InputError
from jaxlora.train import fine_tune
from tests.sweeps.conftest import Swept, curve, see_devices, trial

TRIALS = {
    "a": {"optim__learning_rate": 1e-2},
    "b": {"optim__learning_rate": 3e-3, "lora__rank": 6},
    "c": {"optim__learning_rate": 2e-2, "train__max_steps": 4},
}
SHORT = {"train__max_steps": 6, "eval__every": 3}


def placed(base: Config, **sizes: int) -> Config:
    """The config on another mesh."""
    values = to_dict(base)
    return Config.from_dict(values | {"mesh": values["mesh"] | sizes})


@pytest.fixture(scope="module")
def on_one(base_config, tmp_path_factory) -> Swept:
    with see_devices(1):
        trials = [trial(base_config, name, **(SHORT | changes)) for name, changes in TRIALS.items()]
        return Swept(trials, tmp_path_factory.mktemp("one") / "sweep")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [{"trial": 2, "data": 2, "fsdp": 2}, {"trial": -1, "data": 1, "tensor": 2}],
    ids=["2x2x2", "4 x tensor 2"],
)
def test_the_numbers_are_the_same(on_one, base_config, tmp_path, sizes):
    """Three trials in two parts, one slot empty; and in four."""
    base = placed(base_config, **sizes)
    with see_devices(8):
        trials = [trial(base, name, **(SHORT | changes)) for name, changes in TRIALS.items()]
        swept = Swept(trials, tmp_path / "sweep")
    for name in TRIALS:
        found, expected = (curve(each.folder / name, "train/nll", "eval/nll") for each in (swept, on_one))
        assert len(found) == len(expected) > 6
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        one, other = (
            load_file(each.folder / name / "last" / "adapter_model.safetensors") for each in (swept, on_one)
        )
        for key in one:
            np.testing.assert_allclose(one[key], other[key], rtol=1e-4, atol=1e-4, err_msg=key)
        config = json.loads((swept.folder / name / "config.json").read_text())
        assert config["mesh"]["trial"] == 1  # the trial goes on alone, should somebody want it to


def test_a_run_alone_has_no_trials_to_spread(base_config, tmp_path):
    with pytest.raises(InputError, match=r"(?s)mesh.trial = 2 .*--config.mesh.trial=1"):
        fine_tune(placed(base_config, trial=2, data=1), tmp_path / "run", "tiny.py")
    assert not (tmp_path / "run").exists()
