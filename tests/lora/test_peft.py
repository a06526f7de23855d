"""Adapters travel: PEFT loads our folders and computes our logits, and we load PEFT's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxlora.core.errors import InputError
from jaxlora.core.tree import leaves, map_leaves, unflatten
from jaxlora.lora.peft import CONFIG_FILE, WEIGHTS_FILE, load_peft, read_config, save_peft
from jaxlora.lora.spec import TARGETS, LoraSpec
from jaxlora.lora.tree import adapter_shapes, scale
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import param_shapes

SIZES = {
    "vocab_size": 61,
    "hidden_size": 30,
    "intermediate_size": 47,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
SPEC = DecoderSpec.from_hf(SIZES | {"model_type": "qwen2"})
PREFIX = "base_model.model.model.layers"


def random_adapter(lora, spec=SPEC, seed=0):
    """An adapter in which b is not zero, as after training."""
    rng = np.random.default_rng(seed)
    base = unflatten({path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in param_shapes(spec).items()})
    shapes = adapter_shapes(base, lora.ranks)
    return map_leaves(lambda _, leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)


def assert_equal(one, other):
    one, other = dict(leaves(one)), dict(leaves(other))
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other[path]), err_msg=str(path))


@pytest.mark.parametrize(
    "lora",
    [
        LoraSpec(rank=4, alpha=8.0),
        LoraSpec(rank=1, alpha=0.5, targets=("v_proj", "q_proj"), scaling="rslora", dropout=0.1),
        LoraSpec(rank=33, targets=("down_proj",)),
    ],
)
def test_a_saved_adapter_comes_back_the_same(lora, tmp_path):
    adapter = random_adapter(lora)
    save_peft(tmp_path / "runs" / "a", jax.tree.map(jnp.asarray, adapter), lora, "owner/base", "abc")
    loaded, loaded_spec = load_peft(tmp_path / "runs" / "a", SPEC)
    assert loaded_spec == lora
    assert_equal(loaded, adapter)
    assert {leaf.dtype for _, leaf in leaves(loaded)} == {np.dtype(np.float32)}


def test_the_config_says_everything_that_others_read(tmp_path):
    lora = LoraSpec(rank=4, alpha=8.0, dropout=0.05, targets=("v_proj", "q_proj"), scaling="rslora")
    save_peft(tmp_path / "a", random_adapter(lora), lora, "owner/base", "abc123")
    config = read_config(tmp_path / "a")
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "use_rslora": True,
        "use_dora": False,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "owner/base",
        "revision": "abc123",
        "inference_mode": True,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }
    assert {key: config[key] for key in said} == said
    assert isinstance(config["lora_alpha"], int)  # vLLM reads an integer


def test_the_tensors_are_those_of_peft(tmp_path):
    lora = LoraSpec(rank=4, targets=("q_proj", "down_proj"))
    adapter = random_adapter(lora)
    save_peft(tmp_path / "a", adapter, lora, "base")
    tensors = load_file(tmp_path / "a" / WEIGHTS_FILE)
    assert len(tensors) == 2 * 2 * SPEC.num_layers
    q = adapter["layers"]["self_attn"]["q_proj"]
    np.testing.assert_array_equal(tensors[f"{PREFIX}.2.self_attn.q_proj.lora_A.weight"], q["a"][2].T)
    np.testing.assert_array_equal(tensors[f"{PREFIX}.2.self_attn.q_proj.lora_B.weight"], q["b"][2].T)
    assert tensors[f"{PREFIX}.0.mlp.down_proj.lora_A.weight"].shape == (4, 47)
    with safe_open(tmp_path / "a" / WEIGHTS_FILE, "numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    lora = LoraSpec(rank=4)
    adapter = random_adapter(lora)
    backwards = unflatten(dict(reversed(list(leaves(adapter)))))
    save_peft(tmp_path / "a", adapter, lora, "base")
    save_peft(tmp_path / "b", backwards, LoraSpec(rank=4, targets=tuple(reversed(TARGETS))), "base")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# --- written so that a kill leaves the old adapter or the new one ---


class Killed(BaseException):
    pass


def save_killed_at(monkeypatch, call, *args):
    """Runs save_peft and stops it at its n-th change of the file system; returns whether it got that far."""
    import os
    import pathlib
    import shutil

    calls = 0

    def stopping(function):
        def run(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                raise Killed
            return function(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        for owner, name in (
            (os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (pathlib.Path, "mkdir"),
            (pathlib.Path, "unlink"),
        ):  # fmt: skip
            patch.setattr(owner, name, stopping(getattr(owner, name)))
        try:
            save_peft(*args)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("first", [False, True], ids=["over an older one", "the first one"])
def test_killed_at_any_moment_the_folder_holds_the_old_adapter_or_the_new(first, tmp_path, monkeypatch):
    lora = LoraSpec(rank=4)
    old, new = random_adapter(lora, seed=1), random_adapter(lora, seed=2)
    found = []
    for call in range(1, 100):
        folder = tmp_path / str(call) / "best"
        if not first:
            save_peft(folder, old, lora, "base")
        killed = save_killed_at(monkeypatch, call, folder, new, lora, "base")
        if folder.exists():
            loaded, _ = load_peft(folder, SPEC)
            is_new = np.array_equal(
                loaded["layers"]["mlp"]["up_proj"]["a"], new["layers"]["mlp"]["up_proj"]["a"]
            )
            assert_equal(loaded, new if is_new else old)
            found.append("new" if is_new else "old")
        else:
            assert first
            found.append("none")
        # Whatever was left behind, the next save completes and tidies up.
        save_peft(folder, new, lora, "base")
        assert_equal(load_peft(folder, SPEC)[0], new)
        assert [path.name for path in folder.parent.iterdir()] == ["best"]
        assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
        if not killed:
            break
    assert found[0] == ("none" if first else "old")
    assert found[-1] == "new"
    assert len(found) > 4


def test_an_adapter_with_other_settings_is_never_mixed_with_the_old_one(tmp_path, monkeypatch):
    old, new = LoraSpec(rank=4, alpha=4.0), LoraSpec(rank=4, alpha=64.0)
    for call in range(1, 100):
        folder = tmp_path / str(call)
        save_peft(folder, random_adapter(old, seed=1), old, "base")
        (folder / "README.md").write_text("kept")
        killed = save_killed_at(monkeypatch, call, folder, random_adapter(new, seed=2), new, "base")
        try:
            loaded, spec = load_peft(folder, SPEC)
        except InputError as error:
            assert f"no {WEIGHTS_FILE}" in str(error)  # noqa: PT017
        else:
            assert_equal(loaded, random_adapter(old, seed=1) if spec == old else random_adapter(new, seed=2))
        assert (folder / "README.md").read_text() == "kept"
        if not killed:
            break
    assert spec == new


# --- PEFT itself ---


LORAS = {
    "all-linear": LoraSpec(rank=4, alpha=8.0),
    "q and v, rslora": LoraSpec(rank=9, alpha=4.0, targets=("q_proj", "v_proj"), scaling="rslora"),
    "rank 1, down": LoraSpec(rank=1, alpha=1.5, targets=("o_proj", "down_proj"), dropout=0.3),
}


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
@pytest.mark.parametrize("name", ["Qwen2", "Mistral"])
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_peft_loads_our_folder_and_gives_our_logits(name, lora, tmp_path, peft, make_pair, close):
    pair = make_pair(tmp_path / "base", name)
    adapter = random_adapter(lora, pair.spec)
    save_peft(tmp_path / "a", adapter, lora, str(tmp_path / "base"))
    bare = pair.theirs()
    theirs = pair.theirs(peft.PeftModel.from_pretrained(pair.model, tmp_path / "a").eval())
    assert np.abs(theirs - bare).max() > 0.1  # the adapter is felt
    close("ours exported: logits against PEFT", pair.logits(scale(adapter, lora.scale)), theirs)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
@pytest.mark.parametrize("name", ["Qwen2", "Mistral"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.(up|down)_proj"])
def test_a_folder_that_peft_wrote_is_read_and_written_again(name, targets, tmp_path, peft, make_pair, close):
    import torch

    pair = make_pair(tmp_path / "base", name)
    config = peft.LoraConfig(
        r=5, lora_alpha=7, lora_dropout=0.2, target_modules=targets, task_type="CAUSAL_LM", use_rslora=True
    )
    model = peft.get_peft_model(pair.model, config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path / "theirs")

    adapter, lora = load_peft(tmp_path / "theirs", pair.spec)
    expected = {
        "all-linear": TARGETS,
        "['q_proj', 'v_proj']": ("q_proj", "v_proj"),
        r".*\.(up|down)_proj": ("up_proj", "down_proj"),
    }
    assert lora == LoraSpec(5, 7.0, 0.2, expected[str(targets)], "rslora")
    close("PEFT's imported: logits against PEFT", pair.logits(scale(adapter, lora.scale)), pair.theirs(model))

    save_peft(tmp_path / "ours", adapter, lora, "base")
    first, second = (load_file(tmp_path / folder / WEIGHTS_FILE) for folder in ("theirs", "ours"))
    assert first.keys() == second.keys()
    for tensor_name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[tensor_name], err_msg=tensor_name)


def test_an_adapter_stored_in_half_precision_is_read(tmp_path):
    import ml_dtypes

    lora = LoraSpec(rank=4)
    save_peft(tmp_path / "a", random_adapter(lora), lora, "base")
    tensors = load_file(tmp_path / "a" / WEIGHTS_FILE)
    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    save_file(half, tmp_path / "a" / WEIGHTS_FILE)
    loaded, _ = load_peft(tmp_path / "a", SPEC)
    expected = map_leaves(
        lambda _, leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float32), random_adapter(lora)
    )
    assert_equal(loaded, expected)
