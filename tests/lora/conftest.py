"""Tiny random bases in transformers and in ours, and the logits of both."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.models.decoder import Decoder, unembedding
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import load_params, resolve_model

SIZES = {
    "vocab_size": 61,
    "hidden_size": 30,
    "intermediate_size": 47,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], (2, 13)).astype(np.int32)


@pytest.fixture
def peft():
    pytest.importorskip("torch")
    return pytest.importorskip("peft")


@pytest.fixture(scope="session")
def close():
    """close(what, ours, theirs, bound=1e-4): no element differs by more; -s prints the largest by what."""
    largest: dict[str, tuple[int, float]] = {}

    def check(what: str, ours: np.ndarray, theirs: np.ndarray, bound: float = 1e-4) -> None:
        difference = float(np.abs(ours - theirs).max())
        count, before = largest.get(what, (0, 0.0))
        largest[what] = count + 1, max(before, difference)
        assert difference < bound, what

    yield check
    print("\n\nlargest absolute difference (comparisons)")
    for what, (count, difference) in largest.items():
        print(f"  {difference:.1e}  {what} ({count})")


class Pair(NamedTuple):
    """One random base, twice: `model` is transformers', `base` and `spec` are ours."""

    model: Any
    base: dict[str, Any]
    spec: DecoderSpec

    def logits(self, lora: Any = None, base: Any = None) -> np.ndarray:
        """Ours, with an adapter as the decoder reads it."""
        base = self.base if base is None else base
        positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
        hidden = Decoder(self.spec, dtype=jnp.float32).apply(
            {"params": base, "lora": lora or {}}, jnp.asarray(TOKENS), positions, jnp.ones_like(positions)
        )
        return np.asarray(jnp.einsum("BTD,VD->BTV", hidden, unembedding(base)))

    def theirs(self, model: Any = None) -> np.ndarray:
        """Transformers' or PEFT's."""
        import torch

        with torch.no_grad():
            return (model or self.model)(torch.from_numpy(TOKENS).long()).logits.numpy()


@pytest.fixture
def make_pair():
    """(folder, "Qwen2" or "Mistral") -> Pair; the same weights at every call."""

    def make(folder, name: str) -> Pair:
        import torch
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.15)
        model.save_pretrained(folder)
        files = resolve_model(str(folder))
        spec = DecoderSpec.from_hf(files.config)
        return Pair(model, load_params(files, spec, "float32"), spec)

    return make
