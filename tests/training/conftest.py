"""A decoder small enough to train in a test, in float32, with an adapter that already does something."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.lora import tree as lora
from jaxlora.lora.spec import TARGETS
from jaxlora.models.decoder import Decoder
from jaxlora.models.spec import DecoderSpec
from jaxlora.training.optimizer import OptimizerSettings
from jaxlora.training.state import Settings, TrainState, new_state


class Tiny(NamedTuple):
    decoder: Decoder
    base: dict
    state: TrainState

    def batch(self, seed: int, rows: int, time: int, micro_batches: int | None = None) -> dict:
        """Random tokens with a ragged mask: each row has another share of trained tokens, one row has none."""
        draw = np.random.default_rng(seed)
        vocabulary = self.decoder.spec.vocab_size
        shares = np.linspace(0.0, 1.0, rows)[:, None]
        batch = {
            "tokens": draw.integers(0, vocabulary, (rows, time)).astype(np.int32),
            "targets": draw.integers(0, vocabulary, (rows, time)).astype(np.int32),
            "weights": (draw.random((rows, time)) < shares).astype(np.float32),
            "segments": np.ones((rows, time), np.int32),
            "positions": np.tile(np.arange(time, dtype=np.int32), (rows, 1)),
        }
        if micro_batches is not None:
            batch = {name: x.reshape(micro_batches, -1, time) for name, x in batch.items()}
        return batch


def settings(**changed) -> Settings:
    """Numbers of a short run; fields of the optimiser or of the settings by name."""
    optimizer = OptimizerSettings(
        learning_rate=1e-2, warmup_steps=2, total_steps=20, final_fraction=0.0, weight_decay=0.1,
        b1=0.9, b2=0.999, eps=1e-8, clip_norm=1.0,
    )  # fmt: skip
    inner = {name: value for name, value in changed.items() if name in OptimizerSettings._fields}
    outer = {"label_smoothing": 0.1, "lora_scale": 2.0, "lora_dropout": 0.0, "skip_spikes": 0.0}
    outer |= {name: value for name, value in changed.items() if name in outer}
    outer |= {name: dict.fromkeys(TARGETS, outer[name]) for name in ("lora_scale", "lora_dropout")}
    return Settings(optimizer=optimizer._replace(**inner), **outer)


@functools.cache
def tiny_model() -> tuple[Decoder, dict, dict]:
    """2 layers, odd sizes, grouped-query attention: (decoder, base, adapter); made once in a process."""
    spec = DecoderSpec(
        model_type="qwen2", vocab_size=72, hidden_size=48, intermediate_size=80, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=12, rms_norm_eps=1e-6, rope_theta=10_000.0, qkv_bias=True,
        tie_word_embeddings=False, sliding_window=None, max_position_embeddings=128,
    )  # fmt: skip
    decoder = Decoder(spec, remat="none", dtype=jnp.float32)

    @jax.jit  # one program, where every operation by itself would be compiled: a third of the time
    def weights():
        ids = jnp.ones((1, 4), jnp.int32)
        base = decoder.init(jax.random.key(0), ids, ids, ids)["params"]
        # Far enough from zero that attention and losses are not flat.
        base = jax.tree.map(lambda x: x * 2, base)
        adapter = lora.init(jax.random.key(1), base, dict.fromkeys(TARGETS, 4))
        noise = jax.tree.map(lambda x: 0.02 * jax.random.normal(jax.random.key(2), x.shape), adapter)
        return base, jax.tree.map(jnp.add, adapter, noise)

    return decoder, *weights()


@pytest.fixture(scope="session")
def make_tiny():
    """(**settings) -> Tiny with the same weights at every call."""
    decoder, base, adapter = tiny_model()

    def make(**changed) -> Tiny:
        state = new_state(jax.tree.map(jnp.copy, adapter), jax.random.key(3), settings(**changed))
        return Tiny(decoder, base, state)

    return make
