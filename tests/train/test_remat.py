"""model.remat = auto is the fastest policy that fits; offload is refused where there is nothing to offload to."""

import dataclasses
import types
from typing import Any

import jax
import numpy as np
import pytest

from jaxlora.config.build import inputs, memory, programs
from jaxlora.config.schema import Config
from jaxlora.core.errors import InputError
from jaxlora.models.attention import Attention
from jaxlora.models.decoder import Decoder
from jaxlora.models.spec import DecoderSpec
from jaxlora.parallel.capacity import Capacity
from jaxlora.parallel.mesh import make_mesh
from jaxlora.runs.progress import Progress
from tests.train.test_memory import Lowered

SHAPE = {
    "model_type": "qwen2", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip

TAKES = {"none": 4_000, "dots": 3_000, "full": 2_000, "offload": 1_000}
"""Bytes of eight rows of training; half as many rows take half."""


@pytest.fixture
def fit(monkeypatch):
    """fit(size, platform) fits a run with model.remat = auto into so many bytes; tells what was compiled too."""

    def fit(
        size: int, platform: str, remat: str = "auto", dtype: str = "bfloat16"
    ) -> tuple[memory.Fitted, list[str]]:
        config = Config.from_dict(
            {
                "model": {"path": "x", "remat": remat, "dtype": dtype},
                "data": {"train": "x"},
                "train": {"batch_size": 8, "micro_batch_size": 8},
                "eval": {"batch_size": 1},
            }
        )
        mesh = make_mesh((1, 1, 1), jax.devices()[:1])
        model: Any = types.SimpleNamespace(mesh=mesh, shapes=dict)
        nothing = jax.ShapeDtypeStruct(
            (0,), np.int8, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
        tried: list[str] = []

        def lower_train(config: Config, *_: Any) -> Lowered:
            tried.append(config.model.remat)
            return Lowered(TAKES[config.model.remat] * config.train.micro_batch_size // 8, 0, 10**9)

        patches = {
            "lora_shapes": lambda *_: {},
            "lower_effective": lambda *_: Lowered(0, 0, 10**9),
            "lower_train": lower_train,
            "lower_evaluation": lambda *_: Lowered(0, 0, 10**9),
            "batch_shapes": lambda *_: nothing,
        }
        for name, patch in patches.items():
            monkeypatch.setattr(programs, name, patch)
        monkeypatch.setattr(memory, "offloads", lambda mesh: platform != "cpu")
        monkeypatch.setattr(memory, "on_gpus", lambda mesh: platform == "gpu")
        monkeypatch.setattr(memory, "capacity", lambda *_: Capacity(size, "said"))
        with Progress() as progress:
            return memory.fit(config, model, nothing, None, progress), tried  # pyright: ignore

    return fit


ORDERS = {
    ("gpu", "bfloat16"): ["dots", "full", "offload"],
    ("tpu", "bfloat16"): ["none", "dots", "full", "offload"],
    ("cpu", "bfloat16"): ["dots", "full"],
    ("cpu", "float32"): ["none", "dots", "full"],
}


@pytest.mark.parametrize(
    ("platform", "dtype", "policy"), [(*where, policy) for where, order in ORDERS.items() for policy in order]
)
def test_auto_is_the_fastest_policy_that_fits(fit, capsys, policy, platform, dtype):
    found, tried = fit(TAKES[policy], platform, dtype=dtype)
    order = ORDERS[platform, dtype]
    assert tried == order[: order.index(policy) + 1]
    assert found.config.model.remat == policy
    assert found.needs["training"] == TAKES[policy]
    assert found.programs.train == Lowered(TAKES[policy], 0, 10**9)
    assert f"model.remat = 'auto' is '{policy}': training takes " in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_where_no_policy_fits_a_smaller_micro_batch_is_named(fit, dtype):
    with pytest.raises(InputError, match=r"set --config.train.micro_batch_size=4"):
        fit(TAKES["offload"], "cpu", dtype=dtype)


def test_a_cpu_is_not_given_what_is_slow_there_however_much_fits(fit):
    found, tried = fit(TAKES["none"], "cpu")
    assert (found.config.model.remat, tried) == ("dots", ["dots"])


def test_a_policy_that_was_asked_for_is_not_changed(fit, capsys):
    found, tried = fit(10**6, "tpu", "full")
    assert (found.config.model.remat, tried) == ("full", ["full"])
    assert "auto" not in capsys.readouterr().out


def test_what_does_not_fit_is_told_what_would_save_memory(fit):
    with pytest.raises(InputError, match=r"What helps: --config.model.remat=offload, "):
        fit(1, "tpu", "full")
    with pytest.raises(InputError, match=r"What helps: --config.model.remat=full, "):
        fit(1, "cpu", "dots")
    with pytest.raises(InputError, match=r"What helps: a shorter data.max_length"):
        fit(1, "cpu", "auto")


def test_offload_is_refused_where_the_hosts_memory_is_the_devices_own():
    config = Config.from_dict({"model": {"path": "x", "remat": "offload"}, "data": {"train": "x"}})
    with pytest.raises(InputError, match=r"model.remat = 'offload' .*\nSet --config.model.remat=full"):
        inputs.model(config)


def test_layers_are_not_written_out_for_several_devices():
    model = {"path": "x", "scan_layers": False}
    config = Config.from_dict({"model": model, "data": {"train": "x"}, "mesh": {"fsdp": 4}})
    with pytest.raises(
        InputError, match=r"model.scan_layers = False .* 4 devices.\nSet --config.model.scan_layers=true"
    ):
        inputs.model(config, devices=jax.local_devices()[:4])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("splash", "needs a TPU, and this runs on a cpu"),
        ("cudnn", "needs an NVIDIA GPU .*, and this runs on a cpu"),
    ],
)
def test_attention_that_the_devices_do_not_have_is_refused(kind, said):
    config = Config.from_dict({"model": {"path": "x", "attention": kind}, "data": {"train": "x"}})
    spec: Any = types.SimpleNamespace(head_dim=64)
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    with pytest.raises(InputError, match=f"model.attention = '{kind}' {said}") as refused:
        inputs.attention(config.model, spec, mesh)
    assert "--config.model.attention=auto" in str(refused.value)


@pytest.mark.parametrize(
    ("platform", "capability", "told"),
    [("gpu", "9.0", "cuda"), ("gpu", "7.5", "gpu"), ("gpu", "gfx90a", "gpu"), ("tpu", None, "tpu")],
)
def test_cudnn_is_for_gpus_that_have_its_kernels(platform, capability, told):
    device = types.SimpleNamespace(platform=platform)
    if capability:
        device.compute_capability = capability
    assert inputs.attention_platform(device) == told


def test_attention_is_told_of_examples_where_the_device_can_take_them(monkeypatch):
    """The shortest examples of training and evaluation together say how many one can hold."""
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    spec = DecoderSpec.from_hf(SHAPE)
    model = inputs.Model(None, spec, Decoder(spec, attention=Attention("auto", "cuda")), mesh)  # pyright: ignore

    def known(packing: bool, *lengths: list[int]) -> int | None:  # of the model as it is then
        config = Config.from_dict({"model": {"path": "x"}, "data": {"train": "x", "packing": packing}})
        examples: Any = [types.SimpleNamespace(lengths=np.array(each)) for each in lengths]
        return inputs.knowing_rows(model, config, *examples).decoder.attention.stretches

    assert known(True, [500, 100], [100]) is None  # a CPU
    monkeypatch.setattr(inputs, "by_example", lambda device: True)
    length = Config.from_dict({"model": {"path": "x"}, "data": {"train": "x"}}).data.max_length
    assert known(True, [length - 150, 100], [100]) == 1 + 2
    assert known(True, [length], [length // 3]) == 1 + 1
    assert known(False, [1] * 100, [1]) == 1 + 1
    assert known(True, [1] * length, []) is None  # too many to tell of each
    monkeypatch.setattr(inputs, "packed_is_there", lambda: False)
    assert known(True, [length], [length]) is None  # another JAX
    monkeypatch.undo()
    monkeypatch.setattr(inputs, "by_example", lambda device: True)
    assert known(True, [length], [length]) == 2
    windowed = dataclasses.replace(spec, sliding_window=100)
    model = inputs.Model(None, windowed, Decoder(windowed), mesh)  # pyright: ignore
    assert known(True, [length], [length]) is None


@pytest.mark.parametrize(
    ("platform", "capability", "told"),
    [
        ("gpu", "9.0", True),
        ("gpu", "10.0", False),
        ("gpu", "8.9", False),
        ("gpu", "gfx942", False),
        ("cpu", None, False),
    ],
)
def test_examples_one_by_one_are_for_hopper(platform, capability, told):
    device = types.SimpleNamespace(platform=platform)
    if capability:
        device.compute_capability = capability
    assert inputs.by_example(device) == told
