"""Folders of safetensors become the decoder's parameters, whole or in shards, and nothing else passes for them."""

import json
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jaxlora.core.errors import InputError
from jaxlora.core.tree import leaves
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import load_params, param_shapes, resolve_model, tensor_table

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 24,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "vocab_size": 34,
}
GATE = "model.layers.1.mlp.gate_proj.weight"
NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def random_tensors(config=CONFIG, dtype="float32"):
    """A checkpoint under Hugging Face's names, spelled out here: the loader's own table is what is tested."""
    width, wide, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    keys = width // heads * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (width, width),
            "self_attn.k_proj.weight": (keys, width),
            "self_attn.v_proj.weight": (keys, width),
            "self_attn.o_proj.weight": (width, width),
            "mlp.gate_proj.weight": (wide, width),
            "mlp.up_proj.weight": (wide, width),
            "mlp.down_proj.weight": (width, wide),
        }
        if config["model_type"] == "qwen2":
            block |= {f"self_attn.{n}_proj.bias": (width if n == "q" else keys,) for n in "qkv"}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, np.float32).astype(NUMPY_DTYPES[dtype])
        for name, shape in shapes.items()
    }


def write_folder(folder, tensors, config=CONFIG, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder, dtype="float32", place=None, progress=None):
    files = resolve_model(str(folder))
    return load_params(files, DecoderSpec.from_hf(files.config), dtype, place, progress)


def expected_leaves(tensors, config, dtype):
    """Every leaf, stacked and transposed by hand."""

    def stack(name):
        each = [tensors[f"model.layers.{i}.{name}"] for i in range(config["num_hidden_layers"])]
        return np.stack([x.T if x.ndim == 2 else x for x in each]).astype(NUMPY_DTYPES[dtype])

    expected = {
        ("embed_tokens", "embedding"): tensors["model.embed_tokens.weight"],
        ("norm", "scale"): tensors["model.norm.weight"],
        ("layers", "input_layernorm", "scale"): stack("input_layernorm.weight"),
        ("layers", "post_attention_layernorm", "scale"): stack("post_attention_layernorm.weight"),
    }
    if not config["tie_word_embeddings"]:
        expected["lm_head", "embedding"] = tensors["lm_head.weight"]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        expected["layers", "self_attn", name, "kernel"] = stack(f"self_attn.{name}.weight")
        if config["model_type"] == "qwen2" and name != "o_proj":
            expected["layers", "self_attn", name, "bias"] = stack(f"self_attn.{name}.bias")
    for name in ("gate_proj", "up_proj", "down_proj"):
        expected["layers", "mlp", name, "kernel"] = stack(f"mlp.{name}.weight")
    return {path: leaf.astype(NUMPY_DTYPES[dtype]) for path, leaf in expected.items()}


def assert_loaded(params, tensors, config, dtype):
    found, expected = dict(leaves(params)), expected_leaves(tensors, config, dtype)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == jnp.dtype(dtype), path
        np.testing.assert_array_equal(np.asarray(found[path]), leaf, err_msg=str(path))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_every_leaf_from_every_stored_type(tmp_path, shards, stored, wanted):
    tensors = random_tensors(dtype=stored)
    params = load(write_folder(tmp_path / "m", tensors, shards=shards), wanted)
    assert_loaded(params, tensors, CONFIG, wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"tie_word_embeddings": True},
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    ],
)
def test_tied_and_without_biases(tmp_path, change):
    config = CONFIG | change
    tensors = random_tensors(config)
    params = load(write_folder(tmp_path / "m", tensors, config))
    assert_loaded(params, tensors, config, "float32")
    assert ("lm_head" in params) == (not config["tie_word_embeddings"])


def test_the_table_has_the_shapes_of_what_is_loaded(tmp_path):
    params = load(write_folder(tmp_path / "m", random_tensors()))
    assert param_shapes(DecoderSpec.from_hf(CONFIG)) == {path: leaf.shape for path, leaf in leaves(params)}


def test_the_table_names_every_stored_tensor_once():
    tensors = random_tensors()
    table = tensor_table(DecoderSpec.from_hf(CONFIG))
    named = {name: stored.stored_shape for stored in table.values() for name in stored.names}
    assert named == {name: tensor.shape for name, tensor in tensors.items()}
    assert sum(len(stored.names) for stored in table.values()) == len(tensors)


@pytest.mark.parametrize("axes", [(8, 1), (1, 8), (2, 4), (4, 2)])
def test_each_device_gets_its_part(tmp_path, axes):
    """On eight devices: [in, out] cut both ways, embeddings by rows, norms whole; values as on one device."""
    config = CONFIG | {
        "hidden_size": 48,
        "num_key_value_heads": 3,
        "vocab_size": 40,
        "tie_word_embeddings": True,
    }
    tensors = random_tensors(config, "bfloat16")
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(axes), ("fsdp", "tensor"))
    seen = {}

    def place(path, shape, dtype):
        seen[path] = shape, dtype
        cut = {"kernel": (None, "fsdp", "tensor"), "embedding": ("tensor", "fsdp")}
        return NamedSharding(mesh, PartitionSpec(*cut.get(path.split("/")[-1], ())))

    params = load(write_folder(tmp_path / "m", tensors, config, shards=2), "bfloat16", place)
    assert_loaded(params, tensors, config, "bfloat16")
    assert seen == {"/".join(path): (leaf.shape, leaf.dtype) for path, leaf in leaves(params)}
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")), 3)
    assert kernel.addressable_shards[0].data.shape == (3, 48 // axes[0], 40 // axes[1])


def test_without_a_place_everything_is_on_the_default_device(tmp_path):
    folder = write_folder(tmp_path / "m", random_tensors())
    for params in (load(folder), load(folder, place=lambda path, shape, dtype: None)):
        assert {leaf.sharding for _, leaf in leaves(params)} == {
            jax.sharding.SingleDeviceSharding(jax.devices()[0])
        }


def test_progress_rises_to_the_bytes_of_the_parameters(tmp_path):
    calls = []
    params = load(
        write_folder(tmp_path / "m", random_tensors()), "bfloat16", progress=lambda *at: calls.append(at)
    )
    total = sum(leaf.nbytes for _, leaf in leaves(params))
    assert {of for _, of in calls} == {total}
    done = [at for at, _ in calls]
    assert done == sorted(set(done))
    assert done[-1] == total


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_host_never_holds_the_model_twice(tmp_path, repository):
    """Peak resident memory grows by the parameters and less than a quarter more: no second copy, no mapped file."""
    config = CONFIG | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 8,
        "vocab_size": 24000,
    }
    spec = DecoderSpec.from_hf(config)
    names = {name: x.stored_shape for x in tensor_table(spec).values() for name in x.names}
    write_folder(tmp_path / "m", {n: np.zeros(s, ml_dtypes.bfloat16) for n, s in names.items()}, config)
    script = f"""if True:
        import jax.numpy as jnp, re
        from jaxlora.core.tree import leaves
        from jaxlora.models.spec import DecoderSpec
        from jaxlora.models.weights import load_params, resolve_model
        def peak():
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        jnp.zeros(1).block_until_ready()
        files = resolve_model({str(tmp_path / "m")!r})
        before = peak()
        params = load_params(files, DecoderSpec.from_hf(files.config), "bfloat16")
        print(peak() - before, sum(leaf.nbytes for _, leaf in leaves(params)))
    """
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True
    )
    grown, size = map(int, printed.stdout.split())
    assert size > 200e6
    assert grown < 1.25 * size


# --- what is refused, and what is tolerated ---


def refused(folder, said):
    with pytest.raises(InputError, match=said) as caught:
        load(folder)
    assert str(caught.value).count("\n") < 2
    return str(caught.value)


def test_missing_unexpected_misshapen_and_mistyped_tensors_are_all_named(tmp_path):
    tensors = random_tensors()
    del tensors["model.layers.2.self_attn.q_proj.bias"]
    tensors["model.layers.0.self_attn.o_proj.bias"] = np.zeros(24, np.float32)
    tensors[GATE] = tensors[GATE].T.copy()
    tensors["model.norm.weight"] = np.ones(24, np.int8)
    said = refused(write_folder(tmp_path / "m", tensors), "not those that its config.json describes")
    assert "1 missing (model.layers.2.self_attn.q_proj.bias)" in said
    assert "1 unexpected (model.layers.0.self_attn.o_proj.bias)" in said
    assert f"1 of another shape ({GATE} is [24, 40] instead of [40, 24])" in said
    assert "(model.norm.weight is I8)" in said


def test_a_long_list_of_tensors_is_cut_and_counted(tmp_path):
    tensors = {
        name: x for name, x in random_tensors().items() if "mlp" not in name and "self_attn" not in name
    }
    said = refused(write_folder(tmp_path / "m", tensors), "30 missing")
    assert said.count("model.layers") == 10
    assert "and 20 more" in said


def test_an_untied_model_without_its_head(tmp_path):
    tensors = random_tensors()
    del tensors["lm_head.weight"]
    refused(write_folder(tmp_path / "m", tensors), r"1 missing \(lm_head.weight\)")


def test_rotary_buffers_are_tolerated(tmp_path):
    tensors = random_tensors()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    assert_loaded(load(write_folder(tmp_path / "m", tensors)), random_tensors(), CONFIG, "float32")


@pytest.mark.parametrize("kept", ["both", "head alone"])
def test_a_tied_model_may_store_its_embedding_under_the_heads_name(tmp_path, kept):
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = random_tensors(config)
    stored = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    if kept == "head alone":
        del stored["model.embed_tokens.weight"]
    params = load(write_folder(tmp_path / "m", stored, config, shards=2))
    assert_loaded(params, tensors, config, "float32")


def test_a_tied_model_with_a_head_of_its_own_is_refused(tmp_path):
    tensors = random_tensors()
    folder = write_folder(tmp_path / "m", tensors, CONFIG | {"tie_word_embeddings": True})
    refused(folder, "lm_head.weight.*differs.*tie_word_embeddings to false")


def test_a_folder_that_is_missing_empty_or_something_else(tmp_path):
    refused(tmp_path / "nowhere", "nowhere' does not exist")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "empty", "PEFT adapter.*lora.init_from")
    (tmp_path / "empty" / "config.json").write_text("{")
    refused(tmp_path / "empty", "config.json is not valid JSON")
    (tmp_path / "empty" / "config.json").write_text("[]")
    refused(tmp_path / "empty", "JSON object")


def test_a_folder_without_weights_does_where_none_are_needed(tmp_path):
    folder = write_folder(tmp_path / "m", random_tensors())
    (folder / "model.safetensors").unlink()
    assert resolve_model(str(folder), weights=False).config == CONFIG
    refused(folder, "no safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused_and_never_opened(tmp_path, name):
    folder = write_folder(tmp_path / "m", random_tensors())
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (pickle.loads, (b"cthis\nmust not run\n.",))

    (folder / name).write_bytes(pickle.dumps(Bomb()))
    refused(folder, f"pickle files \\({name}\\).*\n.*save_pretrained")


def test_mistrals_own_format_is_refused_by_name(tmp_path):
    folder = write_folder(tmp_path / "m", random_tensors())
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    refused(folder, "only consolidated.safetensors")


def test_an_index_that_names_a_missing_file(tmp_path):
    folder = write_folder(tmp_path / "m", random_tensors(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "names files that are not there: model-00002-of-00003.safetensors")


def test_an_index_without_a_map(tmp_path):
    folder = write_folder(tmp_path / "m", random_tensors(), shards=2)
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "no weight_map")


@pytest.mark.parametrize("left", [0, 5, 1000, -1])
def test_a_file_that_is_cut_short(tmp_path, left):
    folder = write_folder(tmp_path / "m", random_tensors())
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:left])
    refused(folder, "cut short.*again")


# --- the hub ---


def test_only_what_is_needed_is_asked_of_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    repository = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model.v3", "tokenizer_config.json",
        "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    not_needed = [
        "consolidated.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "README.md",
        "onnx/model.onnx", "original/consolidated.00.pth", "tf_model.h5", "params.json", ".gitattributes",
    ]  # fmt: skip
    commit = write_folder(tmp_path / "snapshots" / "abc123", random_tensors())
    asked = []

    def download(repo_id, *, revision, allow_patterns):
        asked.append(
            (
                repo_id,
                revision,
                list(filter_repo_objects(repository + not_needed, allow_patterns=allow_patterns)),
            )
        )
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = resolve_model("owner/name", "v1.0")
    assert asked[0] == ("owner/name", "v1.0", repository)
    assert (files.name, files.revision, files.folder) == ("owner/name", "abc123", commit)
    resolve_model("owner/name", weights=False)
    assert asked[1] == ("owner/name", None, repository[:-3])


def test_no_network_and_not_cached_is_said_with_the_remedy():
    with pytest.raises(InputError, match=r"'owner/name' is not a local folder.*\n.*copy the model here"):
        resolve_model("owner/name")


@pytest.mark.parametrize("path", ["./owner/name", "/nowhere/at/all", "a/b/c", "~/x/y", ""])
def test_what_cannot_be_a_hub_id_is_a_missing_folder(path):
    with pytest.raises(InputError, match=f"{re.escape(repr(path))} does not exist"):
        resolve_model(path)
