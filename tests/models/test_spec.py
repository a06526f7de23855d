"""A config.json becomes exactly the decoder that transformers would build, or is refused with the reason."""

import dataclasses
import json

import pytest

from jaxlora.core.errors import InputError
from jaxlora.models.spec import DecoderSpec

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "max_window_layers": 2,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 16,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 33,
}
MISTRAL = QWEN2 | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
LLAMA = QWEN2 | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def test_every_field_of_qwen2():
    assert dataclasses.asdict(DecoderSpec.from_hf(QWEN2)) == {
        "model_type": "qwen2",
        "vocab_size": 33,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 3,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "qkv_bias": True,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "max_position_embeddings": 128,
    }


def test_only_qwen2_has_biases():
    assert not DecoderSpec.from_hf(MISTRAL).qkv_bias
    assert not DecoderSpec.from_hf(LLAMA).qkv_bias


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MISTRAL, 16),
        (MISTRAL | {"sliding_window": None}, None),
        (without(MISTRAL, "sliding_window"), 4096),
        (LLAMA, None),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 0}, 16),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 3}, None),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 28}, None),
        (QWEN2 | {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}, 16),
        (QWEN2 | {"use_sliding_window": True, "layer_types": ["full_attention"] * 3}, None),
        (QWEN2 | {"layer_types": ["full_attention"] * 3}, None),
    ],
)
def test_sliding_window(config, window):
    assert DecoderSpec.from_hf(config).sliding_window == window


@pytest.mark.parametrize(
    ("change", "theta"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}, 3e4),
    ],
)
def test_rope_theta_in_the_forms_of_transformers_4_and_5(change, theta):
    assert DecoderSpec.from_hf(QWEN2 | change).rope_theta == theta


def test_rope_theta_left_out_is_ten_thousand():
    assert DecoderSpec.from_hf(without(LLAMA, "rope_theta")).rope_theta == 10_000.0


def test_an_explicit_head_dim_need_not_divide_the_width():
    assert DecoderSpec.from_hf(MISTRAL | {"head_dim": 10}).head_dim == 10


@pytest.mark.parametrize(
    "absent", [without(LLAMA, "num_key_value_heads"), LLAMA | {"num_key_value_heads": None}]
)
def test_an_old_llama_has_as_many_key_heads_as_query_heads(absent):
    assert DecoderSpec.from_hf(absent).num_kv_heads == 6


@pytest.mark.parametrize("name", ["Qwen2", "Mistral", "Llama"])
@pytest.mark.parametrize("use_diff", [True, False])
def test_the_defaults_are_those_of_transformers(name, use_diff):
    """A config that transformers 5 writes, and one that leaves everything else to its defaults, agree."""
    transformers = pytest.importorskip("transformers")
    sizes = without(QWEN2, "architectures", "model_type", "rope_theta", "torch_dtype", "tie_word_embeddings")
    config = getattr(transformers, f"{name}Config")(**sizes)
    written = json.loads(config.to_json_string(use_diff=use_diff))
    spec = DecoderSpec.from_hf(written)
    assert spec.num_kv_heads == 2
    assert spec.tie_word_embeddings is False
    assert spec.rope_theta == 10_000.0
    assert spec.rms_norm_eps == 1e-6
    assert spec.sliding_window == {"Qwen2": None, "Mistral": 16, "Llama": None}[name]
    assert dataclasses.replace(spec, rope_theta=0.0) == dataclasses.replace(
        DecoderSpec.from_hf(sizes | {"model_type": spec.model_type}), rope_theta=0.0
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "no model_type"),
        (QWEN2 | {"model_type": "gemma2"}, "'gemma2'.*qwen2, mistral, llama"),
        (QWEN2 | {"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
        (QWEN2 | {"auto_map": {"AutoModelForCausalLM": "modeling.X"}}, "Python code"),
        (QWEN2 | {"hidden_act": "gelu"}, "'gelu'.*'silu'"),
        (QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling.*yarn"),
        (QWEN2 | {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling.*llama3"),
        (QWEN2 | {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope scaling"),
        (QWEN2 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (LLAMA | {"attention_bias": True}, "attention_bias.*o_proj"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias"),
        (QWEN2 | {"use_mrope": True}, "use_mrope"),
        (QWEN2 | {"is_causal": False}, "is_causal"),
        (MISTRAL | {"num_local_experts": 8}, "experts"),
        (QWEN2 | {"quantization_config": {"quant_method": "gptq"}}, "gptq.*quantised.*bfloat16"),
        (QWEN2 | {"use_sliding_window": True}, "1 of 3 layers.*sliding_window to null"),
        (
            QWEN2 | {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
            "2 of 3 layers",
        ),
        (MISTRAL | {"layer_types": ["full_attention"] * 3}, "0 of 3 layers"),
        (without(QWEN2, "hidden_size"), "no hidden_size"),
        (without(MISTRAL, "num_key_value_heads"), "no num_key_value_heads"),
        (QWEN2 | {"vocab_size": "many"}, "vocab_size 'many'"),
        (QWEN2 | {"num_hidden_layers": 0}, "num_hidden_layers 0"),
        (QWEN2 | {"num_key_value_heads": 4}, "6.*not a multiple.*4"),
        (QWEN2 | {"hidden_size": 25}, "no head_dim.*25"),
        (QWEN2 | {"head_dim": 5}, "5.*even"),
        (QWEN2 | {"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        (QWEN2 | {"rope_theta": True}, "rope_theta True"),
    ],
)
def test_what_cannot_be_computed_faithfully_is_refused_with_the_reason(config, said):
    with pytest.raises(InputError, match=said) as caught:
        DecoderSpec.from_hf(config)
    assert str(caught.value).count("\n") < 2


def test_published_configs(real):
    specs = {
        path.name.removesuffix(".config.json"): DecoderSpec.from_hf(json.loads(path.read_text()))
        for path in (real / "configs").glob("*.config.json")
    }
    assert len(specs) == 5
    assert [specs[f"Mistral-7B-Instruct-v0.{n}"].sliding_window for n in (1, 2, 3)] == [4096, None, None]
    assert specs["Qwen2.5-0.5B-Instruct"].tie_word_embeddings
    assert specs["Qwen2.5-0.5B-Instruct"].sliding_window is None
    assert not specs["Qwen2.5-7B-Instruct"].tie_word_embeddings
    assert specs["Qwen2.5-7B-Instruct"].head_dim == 128
