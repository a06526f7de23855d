"""Adapters that are no plain LoRA, do not fit the base, or are damaged: refused, and the reason is said."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlora.core.errors import InputError
from jaxlora.core.tree import unflatten
from jaxlora.lora.peft import CONFIG_FILE, WEIGHTS_FILE, load_peft, save_peft
from jaxlora.lora.spec import LoraSpec
from jaxlora.lora.tree import init
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


@pytest.fixture
def folder(tmp_path):
    lora = LoraSpec(rank=4, targets=("q_proj", "v_proj"))
    base = unflatten({path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in param_shapes(SPEC).items()})
    save_peft(tmp_path / "a", init(jax.random.key(0), base, lora.ranks), lora, "base")
    return tmp_path / "a"


def refused(folder, said, spec=SPEC):
    with pytest.raises(InputError, match=said) as caught:
        load_peft(folder, spec)
    assert str(caught.value).count("\n") < 2
    return str(caught.value)


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | changes))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("layers_to_transform", [0, 1]),
        ("trainable_token_indices", [3]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("lora_bias", True),
        ("use_qalora", True),
        ("a_variant_of_next_year", {"x": 1}),
        ("bias", "lora_only"),
        ("task_type", "SEQ_CLS"),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("r", 0),
        ("r", "4"),
        ("r", None),
        ("lora_alpha", None),
        ("lora_dropout", 1.5),
        ("target_modules", ["q_proj", "v_proj", "lm_head"]),
    ],
)
def test_variants_and_impossible_settings_are_refused_by_name(folder, key, value):
    change_config(folder, **{key: value})
    said = refused(folder, CONFIG_FILE)
    words = {"r": ("r ", "rank"), "lora_dropout": ("dropout",), "target_modules": ("lm_head",)}
    assert any(word in said for word in words.get(key, (key,)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_version", "9.9"),
        ("init_lora_weights", "gaussian"),
        ("inference_mode", False),
        ("new_key", None),
    ],
)
def test_settings_that_change_nothing_are_read(folder, key, value):
    expected, _ = load_peft(folder, SPEC)
    change_config(folder, **{key: value})
    jax.tree.map(np.testing.assert_array_equal, load_peft(folder, SPEC)[0], expected)


def test_an_adapter_for_another_base_says_which_tensors_do_not_fit(folder):
    wider = DecoderSpec.from_hf(SIZES | {"model_type": "qwen2", "hidden_size": 36})
    said = refused(folder, "does not fit this base.*hidden size 36", wider)
    assert "12 of another shape" in said
    assert "layers.0.self_attn.q_proj.lora_A.weight is [4, 30] instead of [4, 36]" in said
    assert "and 2 more" in said
    deeper = DecoderSpec.from_hf(SIZES | {"model_type": "qwen2", "num_hidden_layers": 4})
    assert "4 missing (layers.3.self_attn" in refused(folder, "does not fit", deeper)
    shallower = DecoderSpec.from_hf(SIZES | {"model_type": "qwen2", "num_hidden_layers": 2})
    assert "4 unexpected (layers.2.self_attn" in refused(folder, "does not fit", shallower)


def test_a_rank_that_is_not_that_of_the_tensors(folder):
    change_config(folder, r=8)
    refused(folder, r"lora_A.weight is \[4, 30\] instead of \[8, 30\]")


def test_a_missing_tensor_and_a_missing_target(folder):
    change_tensors(folder, lambda tensors: tensors.pop(f"{PREFIX}.1.self_attn.v_proj.lora_B.weight"))
    refused(folder, r"1 missing \(layers.1.self_attn.v_proj.lora_B.weight\)")
    change_config(folder, target_modules=["q_proj", "v_proj", "up_proj"])
    refused(folder, "7 missing.*layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.lora_A.weight",
        f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector",
        f"{PREFIX}.0.block_sparse_moe.gate.lora_A.weight",
    ],
)
def test_tensors_beside_the_pairs_of_projections_are_refused_by_name(folder, name):
    change_tensors(folder, lambda tensors: tensors.update({name: np.zeros((4, 30), np.float32)}))
    assert name in refused(folder, "not LoRA pairs of the projections")


def test_a_folder_that_is_missing_or_no_adapter(tmp_path, folder):
    refused(tmp_path / "nowhere", "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", f"has no {CONFIG_FILE}")
    (folder / CONFIG_FILE).write_text("{")
    refused(folder, "not valid JSON")


def test_missing_cut_and_pickled_weights(folder):
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(whole[:-1])
    refused(folder, "cut short")
    (folder / WEIGHTS_FILE).unlink()
    refused(folder, f"no {WEIGHTS_FILE}")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    refused(folder, "adapter_model.bin is a pickle")
