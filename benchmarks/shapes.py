"""The models whose shapes are measured, as the config.json that each was published with; weights are always random."""

from typing import Any

import ml_dtypes
import numpy as np

from jaxlora.models.spec import DecoderSpec

_QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32_768}
_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 1e5, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    # Nobody's: small enough for a test.
    "toy": {
        **_QWEN, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    # Nobody's either: 42 million parameters, 17 of them the embedding.
    "40M": {
        **_LLAMA, "vocab_size": 32_768, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
    },
    # huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
    "135M": {
        **_LLAMA, "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    # huggingface.co/Qwen/Qwen2.5-0.5B-Instruct, Qwen/Qwen2.5-1.5B-Instruct, Qwen/Qwen2.5-7B-Instruct
    "0.5B": {
        **_QWEN, "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "1.5B": {
        **_QWEN, "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "7B": {
        **_QWEN, "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip


def spec(shape: str) -> DecoderSpec:
    return DecoderSpec.from_hf(SHAPES[shape])


def random_bits(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """bfloat16 numbers of either sign, between 2^-7 and 2^-6: a hundred times faster than normal ones.

    The sign and the mantissa are drawn, the exponent is one for all.
    """
    bits = random.integers(0, 2**16, shape, np.uint16)
    bits &= 0x807F  # in place: a side's memory is measured
    bits |= 0x3C00
    return bits.view(ml_dtypes.bfloat16)


RANK, ALPHA, LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 16, 32.0, 2e-4, 0.01, 1.0
"""Of every measured adapter, ours and a peer's: on all linear layers, AdamW over float32 pairs."""
