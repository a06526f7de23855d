"""A merged model is PEFT's merged model and our adapted one, whatever it is stored in and however it is cut."""

import json
import re
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxlora.core.errors import InputError
from jaxlora.core.tree import leaves, map_leaves
from jaxlora.lora import merged, tree, variants
from jaxlora.lora.peft import save_peft
from jaxlora.lora.spec import LoraSpec
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.tensors import weight_files
from jaxlora.models.weights import load_params, resolve_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
LORAS = {
    "plain": LoraSpec(5, 7.0),
    "rslora": LoraSpec(5, 7.0, scaling="rslora", targets=("q_proj", "v_proj", "down_proj")),
    "dora": LoraSpec(3, 4.0, use_dora=True),
    "rank 1": LoraSpec(1, 2.0, targets=("k_proj", "o_proj")),
}
WHOLE = 10**9


def adapter_for(base, lora):
    """Pairs and magnitudes some way from where training starts them."""
    rng = np.random.default_rng(0)
    norms = {
        path: np.linalg.norm(np.asarray(kernel, np.float32), axis=1)
        for path, kernel in tree.adapted_kernels(base, lora.targets).items()
    }
    drawn = map_leaves(
        lambda _, leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32),
        tree.adapter_shapes(base, lora.ranks),
    )
    if lora.use_dora:
        for path, parts in tree.modules(drawn).items():
            noise = rng.standard_normal(norms[path].shape, np.float32)
            drawn[path[0]][path[1]][path[2]] = {**parts, "m": norms[path] * (1 + 0.3 * noise)}
    return drawn


def write(source, out, adapter, lora, size=WHOLE, progress=None):
    files = resolve_model(str(source))
    out.mkdir()
    spec = DecoderSpec.from_hf(files.config)
    return merged.write_merged(files, spec, adapter, lora, out, size, progress)


def tensors(folder):
    return {name: x for file in weight_files(folder) for name, x in load_file(file).items()}


def restore_as(source, target, dtype):
    """The same model, stored in another dtype."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file({name: x.astype(dtype) for name, x in tensors(source).items()}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("name", ["Qwen2", "Mistral"])
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_it_loads_in_transformers_as_pefts_own_merge_and_our_adapted_model(
    name, lora, tmp_path, peft, make_pair
):
    from transformers import AutoModelForCausalLM

    pair = make_pair(tmp_path / "base", name)
    adapter = adapter_for(pair.base, lora)
    sharded = lora.use_dora
    count = write(tmp_path / "base", tmp_path / "out", adapter, lora, 9_000 if sharded else WHOLE)
    assert count > 5 if sharded else count == 1
    ours = pair.theirs(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval())

    save_peft(tmp_path / "a", adapter, lora, str(tmp_path / "base"))
    bare = pair.theirs()
    theirs = peft.PeftModel.from_pretrained(pair.model, tmp_path / "a").eval().merge_and_unload()
    assert np.abs(bare - ours).max() > 0.1  # the adapter is felt
    assert np.abs(pair.theirs(theirs) - ours).max() < 1e-5
    effective = variants.effective(pair.base, adapter, lora.scales)
    assert np.abs(pair.logits(effective) - ours).max() < 1e-4
    # and as the tree's own merge
    files = resolve_model(str(tmp_path / "out"))
    again, expected = load_params(files, pair.spec, "float32"), tree.merge(pair.base, effective)
    for path, leaf in leaves(again):
        np.testing.assert_allclose(leaf, dict(leaves(expected))[path], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("lora", [LORAS["plain"], LORAS["dora"]], ids=["plain", "dora"])
def test_a_narrow_base_gets_the_float32_merge_rounded_once(dtype, lora, tmp_path, make_pair):
    pair = make_pair(tmp_path / "base", "Qwen2")
    narrow = restore_as(tmp_path / "base", tmp_path / "narrow", dtype)
    wide = restore_as(narrow, tmp_path / "wide", np.float32)  # of the same values
    adapter = adapter_for(pair.base, lora)
    write(narrow, tmp_path / "out", adapter, lora)
    write(wide, tmp_path / "expected", adapter, lora)
    found, expected, before = (tensors(tmp_path / name) for name in ("out", "expected", "narrow"))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        np.testing.assert_array_equal(tensor, expected[name].astype(dtype), err_msg=name)
        adapted = name.endswith("_proj.weight")
        assert adapted != np.array_equal(tensor, before[name]), name


def test_each_tensor_keeps_its_own_dtype(tmp_path, make_pair):
    pair = make_pair(tmp_path / "base", "Qwen2")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/config.json").write_bytes((tmp_path / "base/config.json").read_bytes())
    kinds = {"q_proj": np.float64, "up_proj": ml_dtypes.bfloat16, "norm": np.float16}
    stored = {
        name: x.astype(next((kind for word, kind in kinds.items() if word in name), np.float32))
        for name, x in tensors(tmp_path / "base").items()
    }
    save_file(stored, tmp_path / "mixed/model.safetensors")
    lora = LoraSpec(rank=2)
    adapter = adapter_for(pair.base, lora)
    write(tmp_path / "mixed", tmp_path / "out", adapter, lora)
    found = tensors(tmp_path / "out")
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in stored.items()}
    a, b = (adapter["layers"]["self_attn"]["q_proj"][x][0].astype(np.float64) for x in "ab")
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_allclose(found[name], stored[name] + lora.scale * (a @ b).T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_blocks_of_rows_change_nothing(rows, monkeypatch):
    """Up to the order in which a row's products are added up."""
    rng = np.random.default_rng(0)
    stored, a, b, m = (rng.standard_normal(s, np.float32) for s in ((31, 20), (20, 3), (3, 31), (31,)))
    monkeypatch.setattr(merged, "_BLOCK", rows * 20)
    sum_ = stored.astype(np.float64) + 2.5 * (a.astype(np.float64) @ b).T
    np.testing.assert_allclose(merged.merge_stored(stored, {"a": a, "b": b}, 2.5), sum_, rtol=1e-5, atol=1e-6)
    expected = sum_ * (m / np.linalg.norm(sum_, axis=1))[:, None]
    np.testing.assert_allclose(
        merged.merge_stored(stored, {"a": a, "b": b, "m": m}, 2.5), expected, rtol=1e-5, atol=1e-6
    )


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_shards_are_named_and_indexed_as_transformers_does(tmp_path, make_pair):
    """The same sizes give the same split as save_pretrained's, but for the order of the tensors."""
    pair = make_pair(tmp_path / "base", "Qwen2")
    pair.model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    lora = LoraSpec(rank=2)
    adapter = adapter_for(pair.base, lora)
    told = []
    write(tmp_path / "theirs", tmp_path / "out", adapter, lora, 20_000, lambda *at: told.append(at))
    index, theirs = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        for name in ("out", "theirs")
    )
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert index["weight_map"].keys() == theirs["weight_map"].keys()
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert files == sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    for file in files:
        with safe_open(tmp_path / "out" / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    total = index["metadata"]["total_size"]
    assert told == sorted(told)
    assert told[-1] == (total, total)


@pytest.mark.parametrize("stored_as", ["embedding", "both", "head"])
def test_tied_embeddings_stay_tied(stored_as, tmp_path, make_pair):
    from transformers import AutoModelForCausalLM

    pair = make_pair(tmp_path / "base", "Qwen2")
    config = json.loads((tmp_path / "base/config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "tied").mkdir()
    (tmp_path / "tied/config.json").write_text(json.dumps(config))
    stored = tensors(tmp_path / "base")
    table = stored.pop("lm_head.weight")
    names = {"embedding": ["model.embed_tokens.weight"], "head": ["lm_head.weight"]}
    del stored["model.embed_tokens.weight"]
    stored |= dict.fromkeys(names.get(stored_as, names["embedding"] + names["head"]), table)
    save_file({name: x.copy() for name, x in stored.items()}, tmp_path / "tied/model.safetensors")
    lora = LoraSpec(rank=2)
    adapter = adapter_for(pair.base, lora)
    write(tmp_path / "tied", tmp_path / "out", adapter, lora)
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    effective = tree.scale(adapter, lora.scale)
    base = pair.base | {key: {"embedding": jnp.asarray(table)} for key in ("embed_tokens", "lm_head")}
    assert np.abs(pair.theirs(model) - pair.logits(effective, base)).max() < 1e-4


def test_an_untied_head_is_written_as_it_was(tmp_path, make_pair):
    pair = make_pair(tmp_path / "base", "Mistral")
    lora = LoraSpec(rank=2)
    write(tmp_path / "base", tmp_path / "out", adapter_for(pair.base, lora), lora)
    found, before = tensors(tmp_path / "out"), tensors(tmp_path / "base")
    np.testing.assert_array_equal(found["lm_head.weight"], before["lm_head.weight"])
    assert not np.array_equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_config_tokenizer_and_templates_are_copied_and_nothing_else(tmp_path, make_pair):
    pair = make_pair(tmp_path / "base", "Qwen2")
    copied = {
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
        "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/rag.jinja",
        "generation_config.json", "config.json",
    }  # fmt: skip
    (tmp_path / "base/additional_chat_templates").mkdir()
    for name in (*copied - {"config.json"}, "README.md", "optimizer.pt", "consolidated.safetensors"):
        (tmp_path / "base" / name).write_text(name)
    lora = LoraSpec(rank=2)
    write(tmp_path / "base", tmp_path / "out", adapter_for(pair.base, lora), lora)
    files = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.*")}
    assert files == copied | {"model.safetensors"}
    assert (
        len({(tmp_path / "out" / name).stat().st_mode for name in files}) == 1
    )  # readable by all, or as set
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_a_value_that_the_dtype_does_not_hold_is_refused(tmp_path, make_pair):
    pair = make_pair(tmp_path / "base", "Qwen2")
    half = restore_as(tmp_path / "base", tmp_path / "half", np.float16)
    lora = LoraSpec(rank=2, targets=("up_proj",))
    adapter = map_leaves(lambda _, x: x * 3000, adapter_for(pair.base, lora))
    with pytest.raises(
        InputError, match=r"layers\.0\.mlp\.up_proj.* float16 does not hold.*float32"
    ) as error:
        write(half, tmp_path / "out", adapter, lora)
    assert str(half) in str(error.value)


def test_tensors_that_the_table_does_not_know_are_refused(tmp_path, make_pair):
    pair = make_pair(tmp_path / "base", "Qwen2")
    file = tmp_path / "base/model.safetensors"
    save_file(
        tensors(tmp_path / "base") | {"model.layers.0.mlp.up_proj.scales": np.zeros(3, np.float32)}, file
    )
    lora = LoraSpec(rank=2)
    with pytest.raises(InputError, match=re.escape("1 unexpected (model.layers.0.mlp.up_proj.scales)")):
        write(tmp_path / "base", tmp_path / "out", adapter_for(pair.base, lora), lora)


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, make_pair, monkeypatch):
    from jaxlora.models import shards

    pair = make_pair(tmp_path / "base", "Qwen2")
    usage = shards.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    lora = LoraSpec(rank=2)
    with pytest.raises(InputError, match=r"model's \d\d kB do not fit .* has 50 kB free"):
        write(tmp_path / "base", tmp_path / "out", adapter_for(pair.base, lora), lora)
    assert list((tmp_path / "out").iterdir()) == []


# ---- memory --------------------------------------------------------------------------------------------------------

MEASURED = """
import json, resource, sys
from pathlib import Path
import numpy as np
from jaxlora.lora.merged import write_merged
from jaxlora.lora.spec import LoraSpec
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import resolve_model

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

base, out, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
files = resolve_model(str(base))
pair = lambda i, o: {"a": np.ones((2, i, 2), np.float32), "b": np.ones((2, 2, o), np.float32)}
adapter = {"layers": {"mlp": {"up_proj": pair(512, 65536), "down_proj": pair(65536, 512)}}}
spec = LoraSpec(rank=2, targets=("up_proj", "down_proj"))
import huggingface_hub
huggingface_hub.split_state_dict_into_shards_factory
np.ones((512, 512), np.float32) @ np.ones((512, 512), np.float32)  # its threads
out.mkdir()
before = peak()
write_merged(files, DecoderSpec.from_hf(files.config), adapter, spec, out, size)
print(peak() - before)
"""


def test_no_more_than_a_shard_and_a_tensor_stand_in_memory(tmp_path):
    """A base of 400 MB in bfloat16, whose largest tensors have 67 MB: 134 MB as float32."""
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 64, "hidden_size": 512,
        "intermediate_size": 65536, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
        "max_position_embeddings": 64, "sliding_window": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    }  # fmt: skip
    from jaxlora.models.weights import tensor_table

    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    names = {
        name: stored.stored_shape
        for stored in tensor_table(DecoderSpec.from_hf(config)).values()
        for name in stored.names
    }
    held = {name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in names.items()}
    total = sum(x.nbytes for x in held.values())
    save_file(held, tmp_path / "base/model.safetensors")
    command = [sys.executable, "-c", MEASURED, tmp_path / "base", tmp_path / "out", str(80_000_000)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    largest, block = 65536 * 512 * 2, 2**24
    assert total > 400_000_000
    assert int(ended.stdout) < 80_000_000 + largest + 3 * block
