"""What answers prompts: a base on as many devices as its heads allow, with or without an adapter."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.config.build.inputs import Model
from jaxlora.lora import tree as lora
from jaxlora.lora.peft import load_peft
from jaxlora.models.decoder import Decoder
from jaxlora.models.decoding import Session
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import resolve_model
from jaxlora.parallel import sharding
from jaxlora.parallel.mesh import make_mesh


def answering_model(path: str, revision: str, dtype: str) -> Model:
    """Finds a base for one conversation at a time; loads no weights.

    There are no rows to share out, so devices share every matrix product, as many as divide the key heads.

    Args:
        path, revision, dtype: as in the config's `model`.
    Raises:
        InputError: no such model, or one that the decoder cannot compute.
    """
    files = resolve_model(path, revision)
    spec = DecoderSpec.from_hf(files.config)
    devices = jax.devices()
    shared = (spec.num_kv_heads, spec.intermediate_size, spec.vocab_size)
    count = max(n for n in range(1, len(devices) + 1) if not any(size % n for size in shared))
    mesh = make_mesh((1, 1, count), devices[:count])
    everywhere = NamedSharding(mesh, PartitionSpec()) if count > 1 else None
    decoder = Decoder(spec, remat="none", dtype=jnp.dtype(dtype), activation_sharding=everywhere)
    return Model(files, spec, decoder, mesh)


def adapter(model: Model, folder: Path) -> dict[str, Any]:
    """Reads a PEFT folder: the scaled adapter, placed beside the base.

    Raises:
        InputError: not an adapter, or not one for this base.
    """
    pairs, spec = load_peft(folder, model.spec)
    scaled = lora.scale(pairs, spec.scale)
    return jax.device_put(scaled, sharding.tree_shardings(model.mesh, scaled))


def session(model: Model, base: dict[str, Any], scaled_adapter: dict[str, Any]) -> Session:
    """A conversation with a base and a scaled adapter ({} for none)."""
    cache = sharding.cache_sharding(model.mesh, model.spec.num_kv_heads) if model.mesh.size > 1 else None
    return Session(model.decoder, base, scaled_adapter, cache)
