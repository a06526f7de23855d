"""What answers prompts: a base on as many devices as its heads allow, with or without an adapter."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.config.build.inputs import Model, attention_platform, check_blocks
from jaxlora.core.compilation import compiler_options
from jaxlora.core.quantised import block_of
from jaxlora.lora import variants
from jaxlora.lora.spec import LoraSpec
from jaxlora.models.attention import Attention
from jaxlora.models.decoder import Decoder
from jaxlora.models.decoding import Session
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import resolve_model
from jaxlora.parallel import sharding
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rows import placed


def answering_model(
    path: str, revision: str, dtype: str, quantize: str = "none", quantize_embeddings: str = "none"
) -> Model:
    """Finds a base for one conversation at a time; loads no weights.

    There are no rows to share out, so devices share every matrix product, as many as divide the key heads.

    Args:
        path, revision, dtype, quantize, quantize_embeddings: as in the config's `model`.
    Raises:
        InputError: no such model, or one that the decoder cannot compute.
    """
    files = resolve_model(path, revision)
    spec = DecoderSpec.from_hf(files.config)
    check_blocks(spec, quantize, quantize_embeddings)
    devices = jax.devices()
    shared = [spec.num_kv_heads, spec.intermediate_size, spec.vocab_size]
    if quantize != "none":
        cut = (spec.num_heads * spec.head_dim, spec.intermediate_size)  # the inputs of o_proj and down_proj
        shared += [inputs // block_of(inputs) for inputs in cut]
    count = max(n for n in range(1, len(devices) + 1) if not any(size % n for size in shared))
    mesh = make_mesh((1, 1, count), devices[:count])
    everywhere = NamedSharding(mesh, PartitionSpec()) if count > 1 else None
    decoder = Decoder(
        spec,
        remat="none",
        dtype=jnp.dtype(dtype),
        activation_sharding=everywhere,
        attention=Attention(platform=attention_platform(devices[0])),
    )
    return Model(files, spec, decoder, mesh, quantize, quantize_embeddings)


def effective(
    model: Model, base: Mapping[str, Any], adapter: Mapping[str, Any], spec: LoraSpec
) -> dict[str, Any]:
    """An adapter that was read (see `load_peft`), as the decoder reads it, placed beside the base."""
    given = placed(dict(adapter), sharding.tree_shardings(model.mesh, adapter))

    def make(base: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
        return variants.effective(base, adapter, spec.scales)

    placements = sharding.tree_shardings(model.mesh, jax.eval_shape(make, base, given))
    options = compiler_options(model.mesh.devices.flat[0].platform)
    return jax.jit(make, out_shardings=placements, compiler_options=options)(base, given)


def session(model: Model, base: dict[str, Any], lora: dict[str, Any]) -> Session:
    """A conversation with a base and an adapter as the decoder reads it ({} for none)."""
    cache = sharding.cache_sharding(model.mesh, model.spec.num_kv_heads) if model.mesh.size > 1 else None
    return Session(model.decoder, base, lora, cache)
