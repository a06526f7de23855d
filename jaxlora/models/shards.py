"""Writing a Hugging Face folder's weights: one shard after the other, so that one at a time stands in memory."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxlora.core.errors import InputError


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    tensor: Callable[[str], np.ndarray],
    max_shard_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes model.safetensors, or several shards and their index, under the names that transformers gives them.

    Args:
        folder: there already.
        sizes: bytes of every tensor, by name; they are written in this order.
        tensor: gives a tensor by its name; called once for each, in order.
        max_shard_size: bytes in a shard; a larger tensor has one to itself.
        progress: called with (bytes taken so far, bytes in all).
    Returns:
        The number of shards.
    Raises:
        InputError: the disk has no room for them.
        OSError: it could not be written.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    total, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if total > free:
        raise InputError(
            f"the model's {gigabytes(total)} do not fit where it is to be written: {folder.parent} has "
            f"{gigabytes(free)} free. Make room, or name a folder on another disk."
        )
    split = split_state_dict_into_shards_factory(
        dict(sizes),
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    done = 0
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            shard[name] = tensor(name)
            done += shard[name].nbytes
            if progress:
                progress(done, total)
        _save(shard, folder / file)
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return len(split.filename_to_tensors)


def gigabytes(size: int) -> str:
    """ "15.2 GB", "988 MB", "12 kB"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.{1 if size < 100 * unit else 0}f} {name}"
    return f"{size / 1000:.0f} kB"


def _save(tensors: dict[str, np.ndarray], file: Path) -> None:
    file.touch()
    mode = file.stat().st_mode  # the writer's own files are for nobody but their owner
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # the writer is not Python's, and puts the system's error into words
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(file)) from error
    file.chmod(mode)
