"""What a decoder is: every number that its computation depends on, read from a Hugging Face config."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxlora.core.errors import InputError

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
"""model_type -> the class in `transformers` whose function the decoder computes."""

# Keys that change the function that is computed: refused when they are set to anything but zero or false.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_FALSE_ONLY = {
    "attention_bias": "a bias on o_proj",
    "mlp_bias": "biases in the feed-forward layers",
    "use_mrope": "multimodal rotary positions",
}


@dataclass(frozen=True)
class DecoderSpec:
    """The shape and the constants of one decoder; hashable, so a compiled function can be specialised on it.

    Attributes:
        model_type: "qwen2", "mistral" or "llama".
        vocab_size, hidden_size, intermediate_size: V, D and F.
        num_layers, num_heads, num_kv_heads, head_dim: L, H, K and h; K divides H; H * h may differ from D.
        rms_norm_eps: added to the mean square under the root.
        rope_theta: base of the rotary frequencies, `rope_theta ** (-2 i / h)`.
        qkv_bias: whether q_proj, k_proj and v_proj have biases (o_proj and the feed-forward layers never do).
        tie_word_embeddings: whether the unembedding is the embedding.
        sliding_window: a query sees keys at most `sliding_window - 1` positions back; None for all of them.
        max_position_embeddings: the longest row the model was trained for.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    qkv_bias: bool
    tie_word_embeddings: bool
    sliding_window: int | None
    max_position_embeddings: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderSpec":
        """Reads a Hugging Face `config.json`, as written by transformers 4 or 5.

        Args:
            config: the parsed config.json. A key that is absent has the default that transformers gives it.
        Returns:
            The spec.
        Raises:
            InputError: the decoder would not compute what transformers computes from this config, or a number
                is missing or impossible.
        """
        model_type = config.get("model_type")
        if model_type not in ARCHITECTURES:
            found = f"model_type {model_type!r}" if model_type else "no model_type"
            raise InputError(f"config.json has {found}; the supported ones are {', '.join(ARCHITECTURES)}.")
        _refuse_what_changes_the_function(config, model_type)

        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads = (
            _size(config, key) for key in sizes
        )
        # Llama configs older than grouped-query attention lack the key; for the others it is always written.
        multi_head = config.get("num_key_value_heads", 0 if model_type != "llama" else None) is None
        num_kv_heads = num_heads if multi_head else _size(config, "num_key_value_heads")
        if num_heads % num_kv_heads:
            raise InputError(
                f"config.json has num_attention_heads {num_heads}, which is not a multiple of "
                f"num_key_value_heads {num_kv_heads}."
            )
        if config.get("head_dim") is not None:
            head_dim = _size(config, "head_dim")
        elif hidden_size % num_heads == 0:
            head_dim = hidden_size // num_heads
        else:
            raise InputError(
                f"config.json has no head_dim, and hidden_size {hidden_size} is not a multiple of "
                f"num_attention_heads {num_heads}."
            )
        if head_dim % 2:
            raise InputError(f"the head dimension is {head_dim}; rotary embeddings need an even one.")

        return cls(
            model_type=model_type,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_positive(config, "rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(config),
            qkv_bias=model_type == "qwen2",
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            sliding_window=_sliding_window(config, model_type, num_layers),
            max_position_embeddings=_size(config, "max_position_embeddings"),
        )


def _refuse_what_changes_the_function(config: Mapping[str, Any], model_type: str) -> None:
    """Refuses architectures, activations, biases, experts and quantisation that the decoder does not have."""
    expected = ARCHITECTURES[model_type]
    architectures = config.get("architectures") or [expected]
    if expected not in architectures:
        raise InputError(
            f"config.json has architectures {architectures}; for model_type {model_type!r} only "
            f"{expected} is supported."
        )
    custom = sorted(key for key in config.get("auto_map") or {} if key.startswith("AutoModel"))
    if custom:
        raise InputError(
            f"config.json asks for the model's own Python code (auto_map: {', '.join(custom)}), which is "
            f"never run. Only the function of transformers' {expected} is supported."
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise InputError(f"config.json has hidden_act {activation!r}; only 'silu' is supported.")
    for key, meaning in _FALSE_ONLY.items():
        if config.get(key):
            raise InputError(
                f"config.json has {key} {config[key]!r}, that is {meaning}, which is not supported."
            )
    if config.get("is_causal") is False:
        raise InputError(
            "config.json has is_causal false: an encoder, not a language model that can be fine-tuned here."
        )
    for key in _EXPERTS:
        if config.get(key):
            raise InputError(f"config.json has {key} {config[key]!r}: mixtures of experts are not supported.")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise InputError(
            f"config.json has a quantization_config (quant_method {method!r}): quantised weights are not "
            "supported. Use the model in bfloat16, float16 or float32."
        )


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base; transformers 5 keeps it in rope_parameters, 4 beside rope_scaling."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or any(isinstance(value, Mapping) for value in rope.values()):
        raise InputError(
            f"config.json asks for rope scaling ({rope}); only plain rotary embeddings (rope_type 'default') "
            "are supported. If your rows are short enough to do without it, remove it from the config."
        )
    rotated = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rotated not in (None, 1):
        raise InputError(
            f"config.json has partial_rotary_factor {rotated!r}; all of a head must be rotated (1.0)."
        )
    return _positive(rope if "rope_theta" in rope else config, "rope_theta", 10_000.0)


def _sliding_window(config: Mapping[str, Any], model_type: str, num_layers: int) -> int | None:
    """The window that every layer has, or None. The stacked layers are one function: a mixture is refused."""
    if model_type == "llama" or (model_type == "qwen2" and not config.get("use_sliding_window", False)):
        window = None
    else:
        window = config.get("sliding_window", 4096)  # transformers' default for both
        if window is not None:
            window = _size({"sliding_window": window}, "sliding_window")
    sliding = num_layers if window is not None else 0
    if sliding and config.get("layer_types"):
        sliding = list(config["layer_types"]).count("sliding_attention")
    elif sliding and model_type == "qwen2":
        sliding = max(0, num_layers - config.get("max_window_layers", 28))
    # transformers' Mistral does not look at layer_types, other readers do: only agreement is unambiguous.
    if 0 < sliding < num_layers or (model_type == "mistral" and window is not None and not sliding):
        raise InputError(
            f"config.json gives {sliding} of {num_layers} layers a sliding window of {window}; only all layers "
            "or none are supported. If your rows are shorter than the window, set sliding_window to null in it."
        )
    return window if sliding else None


def _size(config: Mapping[str, Any], key: str) -> int:
    """A required positive integer."""
    value = config.get(key)
    if value is None:
        raise InputError(f"config.json has no {key}.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"config.json has {key} {value!r}; it must be a positive integer.")
    return value


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    """A positive finite number."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"config.json has {key} {value!r}; it must be a positive number.")
    return float(value)
