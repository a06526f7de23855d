"""A base with an adapter merged into it, as a Hugging Face folder: tensor by tensor, on NumPy alone.

The same as `tree.merge`, for bases that need not fit into memory: there is never more than one shard of the result
and the tensor being read.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora.core.errors import InputError
from jaxlora.lora.spec import LoraSpec
from jaxlora.lora.tree import modules
from jaxlora.models.shards import write_shards
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.tensors import Tensors
from jaxlora.models.weights import TOKENIZER_FILES, ModelFiles, tensor_table

_BLOCK = 2**22  # elements of a matrix that are worked on at once: 16 MiB in float32


def write_merged(
    files: ModelFiles,
    decoder_spec: DecoderSpec,
    adapter: Mapping[str, Any],
    spec: LoraSpec,
    folder: Path,
    max_shard_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes the base with the adapter merged in: weights, config, tokenizer and chat template.

    Every tensor keeps its name and its dtype; those without an adapter keep their bits.

    Args:
        files, decoder_spec: the base.
        adapter, spec: as `load_peft` gives them: unscaled arrays by path, and their constants.
        folder: there already.
        max_shard_size: bytes in a file of weights.
        progress: called with (bytes done, bytes in all).
    Returns:
        The number of files of weights.
    Raises:
        InputError: the base's tensors are not those of its config, or a merged value is not finite in its dtype.
        OSError: the folder could not be written.
    """
    table, scales = tensor_table(decoder_spec), spec.scales
    shapes = {name: stored.stored_shape for stored in table.values() for name in stored.names}
    adapted = {
        name: ({leaf: stack[layer] for leaf, stack in parts.items()}, scales[path[-1]])
        for path, parts in modules(adapter).items()
        for layer, name in enumerate(table[(*path, "kernel")].names)
    }
    with Tensors(files.folder) as tensors:
        tensors.check(shapes, decoder_spec.tie_word_embeddings)
        dtypes = tensors.dtypes(shapes.keys())

        def tensor(name: str) -> np.ndarray:
            stored = tensors.read(name)
            if name not in adapted:
                return stored
            merged = merge_stored(stored, *adapted[name])
            if not np.isfinite(merged).all() and np.isfinite(stored).all():
                raise InputError(
                    f"{name} of {files.name}, merged with the adapter, has values that {stored.dtype} does not hold: "
                    "the adapter has diverged, or the base's dtype is too narrow for it. Export another step, or merge "
                    "onto a float32 copy of the base."
                )
            return merged

        sizes = {
            name: int(np.prod(shapes[name], dtype=np.int64)) * kind.itemsize for name, kind in dtypes.items()
        }
        count = write_shards(folder, sizes, tensor, max_shard_size, progress)
    for pattern in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        for file in files.folder.glob(pattern):
            if file.is_file():
                copy = folder / file.relative_to(files.folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    return count


def merge_stored(stored: np.ndarray, parts: Mapping[str, np.ndarray], scale: float) -> np.ndarray:
    """One matrix, as Hugging Face stores it, with its adapter merged in.

    W' = W + s (a b)^T,   with DoRA   W' = m (W + s (a b)^T) / ||W + s (a b)^T||, output by output

    Computed in float32 (float64 for a float64 matrix), some rows at a time, and rounded once, to nearest even.

    Args:
        stored: W [O, I].
        parts: a [I, R], b [R, O], and with DoRA m [O], unscaled.
        scale: s.
    Returns:
        W' [O, I] in W's dtype.
    """
    wide = np.result_type(stored.dtype, np.float32)
    a, b = parts["a"].T.astype(wide), parts["b"].T.astype(wide) * wide.type(scale)
    merged = np.empty_like(stored)
    rows = max(1, _BLOCK // stored.shape[1])
    for start in range(0, stored.shape[0], rows):
        block = slice(start, start + rows)
        whole = b[block] @ a
        whole += stored[block]
        with np.errstate(all="ignore"):  # the caller looks at what is not finite
            if "m" in parts:
                whole *= (parts["m"][block] / np.linalg.norm(whole, axis=1))[:, None]
            merged[block] = whole
    return merged
