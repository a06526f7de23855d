"""What the compiled programs would take: from a config.json alone, for the devices that are asked for."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import pytest

from jaxlora.config.build import dataplan, inputs, programs, works
from jaxlora.config.load import load_config
from jaxlora.core.errors import InputError
from jaxlora.parallel import chips, topology

TINY = {
    "model_type": "qwen2", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {
    "train__batch_size": 4,
    "train__micro_batch_size": 2,
    "eval__batch_size": 2,
    "eval__max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder with a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


@pytest.fixture
def compiled(call, bare, tmp_path):
    """compiled("--devices", 2, key=value) -> (exit code, stdout, stderr, JSON) of the compile part; no data there."""

    def compiled(*words, **changed):
        file = tmp_path / "plan.json"
        settings = {"model__path": bare, "data__train": "nowhere.jsonl", "data__eval": "", **SMALL, **changed}
        code, out, err = call("--only", "compile", "--json", file, *words, **settings)
        return code, out, err, json.loads(file.read_text())["compile"] if file.exists() else None

    return compiled


def test_a_config_json_is_enough_and_the_numbers_are_the_compilers(compiled, folder, bare):
    code, out, err, found = compiled("--devices", 2, mesh__data=1, mesh__fsdp=2, optim__label_smoothing=0.1)
    assert code == 0, err
    config = load_config(
        str(folder / "tiny.py"),
        [
            f"--config.{key.replace('__', '.')}={value}"
            for key, value in {**SMALL, "model__path": bare, "mesh__data": 1, "mesh__fsdp": 2}.items()
        ],
    )
    model = inputs.model(config, weights=False, devices=jax.devices()[:2])
    state = programs.state_shapes(config, model, steps=10)
    assert found["parameters"] == works.size_on_device(model.shapes())
    assert found["trained"] == works.size_on_device(state.adapter)
    # Adam's two moments, and its counter
    assert 2 * found["trained"] <= found["optimizer"] <= 2 * found["trained"] + 64
    (train,) = programs.compile_all(model, [programs.lower_train(config, model, state)])
    assert train is not None
    sizes, told = train.memory_analysis(), found["programs"]["training"]
    assert told["arguments"] == sizes.argument_size_in_bytes
    assert told["temporaries"] == sizes.temp_size_in_bytes
    batches = works.size_on_device(programs.batch_shapes(config, model.mesh, 2, 2))
    assert told["peak"] == works.needed(train) + 2 * batches
    assert told["collectives"]["all-gather"] > 0
    assert found["programs"]["generation"]["rows"] == 2
    assert found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1}
    assert found["largest_micro_batch"] == 4
    assert found["fits"]
    assert found["smoothing_floor"] == dataplan.smoothing_floor(0.1, 320)
    for word in (
        "activations (temporaries)",
        "all-gather",
        "adapter + optimizer",
        "computed twice",
        "LoRA scale",
    ):
        assert word in out
    assert "the peak of a cpu is not known" in out
    assert "eval.generate is 0: a run would not compile generation" in out


@pytest.mark.slow
def test_a_base_in_four_bits_is_as_small_as_it_will_be(compiled):
    plain, four = (compiled("--devices", 1, model__quantize=kind)[3] for kind in ("none", "nf4"))
    kernels = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert plain["parameters"] - four["parameters"] == kernels * 2 - (kernels // 2 + kernels // 64 * 2)
    saved = plain["programs"]["training"]["arguments"] - four["programs"]["training"]["arguments"]
    assert saved == plain["parameters"] - four["parameters"]


@pytest.mark.slow
def test_embeddings_in_four_bits_are_as_small_as_they_will_be(compiled):
    plain, four = (compiled("--devices", 1, model__quantize_embeddings=kind)[3] for kind in ("none", "nf4"))
    values = 2 * 320 * 64
    assert plain["parameters"] - four["parameters"] == values * 2 - (values // 2 + values // 64 * 2)
    saved = plain["programs"]["training"]["arguments"] - four["programs"]["training"]["arguments"]
    assert saved == plain["parameters"] - four["parameters"]


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_the_remedy(compiled):
    _, _, _, all_of_it = compiled("--devices", 1)
    one = all_of_it["programs"]["training"]["peak"]
    code, out, _, found = compiled(
        "--devices", 1, train__micro_batch_size=4, mesh__memory_gb=(one + 1000) / 1e9
    )
    assert code == 1
    assert not found["fits"]
    assert found["largest_micro_batch"] == 2
    assert "it does not fit: train.micro_batch_size = 4 takes " in out
    assert "--config.train.micro_batch_size=2. It changes nothing but speed." in out
    code, out, _, found = compiled("--devices", 1, mesh__memory_gb=1e-4)
    assert code == 1
    assert found["largest_micro_batch"] is None
    assert "What helps: " in out
    assert "largest micro-batch  none" in out


@pytest.mark.parametrize(
    ("words", "changed", "said"),
    [
        (("--topology", "v7:2x2"), {}, r"--topology v7:2x2: there is no such topology. Known are v4, v5e, v5p, v6e"),
        (("--topology", "v5e:2x4x1"), {}, "a v5e has 2 axes"),
        (("--topology", "v5e:2x4", "--devices", 2), {}, "leave out --devices 2"),
        (("--devices", 0), {}, "--devices 0 must be at least 1"),
        (("--devices", 9), {}, "JAX has started with 8 already"),
        (("--devices", 2), {"mesh__data": 3}, r"mesh.data = 3, .* cannot be laid over 2 devices"),
        (("--devices", 4), {}, r"train.micro_batch_size = 2 cannot be shared out evenly over 4 devices"),
        (("--devices", 1), {"train__micro_batch_size": 3}, "train.micro_batch_size"),
        (("--devices", 1), {"model__path": "no/where"}, "no/where"),
        (("--devices", 1), {"eval__max_new_tokens": 300}, "leaves no room for a prompt"),
        (("--devices", 7), {"mesh__tensor": 7, "mesh__data": 1}, "mesh.tensor = 7 does not divide .*its 320"),
    ],
)  # fmt: skip
def test_bad_input(compiled, words, changed, said):
    code, _, err, found = compiled(*words, **changed)
    assert code == 2
    assert found is None
    assert re.search(said, err), err


def test_without_libtpu_it_says_how_to_get_it(compiled, monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find(name, *a)
    )
    code, _, err, _ = compiled("--topology", "v5e:2x4")
    assert code == 2
    assert 'pip install "jax[tpu]", or pip install "libtpu' in err


@pytest.mark.slow
def test_both_parts_by_default(folder, bare, tmp_path, monkeypatch, call):
    """With a model that has a tokenizer and a config.json."""
    for file in (folder / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    file = tmp_path / "plan.json"
    code, out, err = call(
        "--only", "data,compile", "--devices", 1, "--json", file, model__path=tmp_path,
        **SMALL | {"train__micro_batch_size": 4},
        stop__patience=2, train__max_steps=40, eval__every=5,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(file.read_text())
    assert found["compile"]["fits"]
    assert found["data"]["train"]["conversations"] == 40
    assert found["data"]["run"]["steps"] == 40
    assert found["data"]["run"]["warmup_share"] == 2 / 40
    assert found["data"]["run"]["earliest_stop"] == {"evaluations": 3, "step": 10}
    assert "not before step 10, the 3th evaluation" in out
    assert "the programs, on each device" in out


def test_a_file_that_cannot_be_written_is_said_before_anything_is_compiled(call, bare, tmp_path):
    code, out, err = call(
        "--only", "compile", "--json", tmp_path / "none/plan.json", model__path=bare, **SMALL
    )
    assert code == 2
    assert f"--json {tmp_path}/none/plan.json: there is no folder" in err
    assert out == ""


def test_the_chip_is_found_by_its_kind():
    assert {kind: chips.find(kind).name for chip in chips.CHIPS for kind in chip.kinds} == {  # type: ignore[union-attr]
        kind: chip.name for chip in chips.CHIPS for kind in chip.kinds
    }
    assert chips.find("NVIDIA H100 80GB HBM3").name == "H100"  # type: ignore[union-attr]
    assert chips.find("TPU v5 lite").name == "TPU v5e"  # type: ignore[union-attr]
    assert chips.find("cpu") is None


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:", "v5e:2", "v4:2x2", "v6e:0x4", "v5e:2x-4", "v5e:1000x1000", ""]
)
def test_no_topologies(name):
    with pytest.raises(InputError, match="--topology"):
        topology.parse(name)


COMMAND = [sys.executable, "-m", "jaxlora.plan", "--only", "compile"]


@pytest.mark.slow
def test_as_a_command_it_simulates_the_devices_that_are_asked_for(folder, bare):
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in SMALL.items()]
    ended = subprocess.run(
        [*COMMAND, "--config", folder / "tiny.py", "--devices", "2", f"--config.model.path={bare}", *flags],
        capture_output=True, text=True, check=False, env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "memory of each of 2 x cpu (data 2 x fsdp 1 x tensor 1)" in ended.stdout


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install libtpu)")
@pytest.mark.parametrize(
    ("name", "fsdp", "told"),
    [("v5e:2x4", 8, "8 x TPU v5 lite"), ("v5e:1x1", 1, "1 x TPU v5 lite"), ("v4:2x2x1", 4, "4 x TPU v4")],
)
def test_a_tpu_that_is_not_there(folder, bare, name, fsdp, told, tmp_path):
    settings = {
        **SMALL,
        "model__path": bare,
        "mesh__data": 1,
        "mesh__fsdp": fsdp,
        "train__micro_batch_size": 8,
    }
    settings |= {"train__batch_size": 8, "train__micro_batch_size": 8, "eval__batch_size": 8}
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]
    file = tmp_path / "plan.json"
    ended = subprocess.run(
        [*COMMAND, "--config", folder / "tiny.py", "--topology", name, "--json", file, *flags],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = json.loads(file.read_text())["compile"]
    assert f"memory of each of {told}" in ended.stdout
    assert found["capacity"]["size"] == chips.find(found["device_kind"]).memory  # type: ignore[union-attr]
    assert found["estimated_step_seconds"]["0.5"] == pytest.approx(
        found["flops"]["total"] / (found["devices"] * found["peak"] * 0.5)
    )
    assert bool(found["programs"]["training"]["collectives"]) == (fsdp > 1)
