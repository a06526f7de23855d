"""The tensors of a Hugging Face folder: which files hold them, whether they are the expected ones, and their slices."""

import json
import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  numpy learns the name bfloat16, by which safetensors asks for it
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxlora.core.errors import InputError

_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LISTED = 10

Part = tuple[tuple[int, int], ...]
"""(start, stop) along each axis."""


class Tensors:
    """All tensors of a folder's safetensors, as if in one file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = ExitStack()
        self._handles: dict[str, Any] = {}
        self._places: dict[str, _Place] = {}
        for file in weight_files(folder):
            try:
                # pread: a memory map would add every page that was ever read to this process's resident memory.
                handle = self._files.enter_context(safe_open(file, framework="numpy", backend="pread"))
                self._handles |= dict.fromkeys(handle.offset_keys(), handle)
                self._places |= _places(file)
            except (SafetensorError, OSError) as error:
                self._files.close()
                raise InputError(
                    f"{file} cannot be read ({error}). It is cut short, a Git LFS pointer, or no safetensors file: "
                    "download or copy it again."
                ) from error

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def check(self, shapes: Mapping[str, tuple[int, ...]], tied: bool) -> None:
        """Raises an InputError that names the tensors that are missing, unexpected, or not of the expected shape.

        Args:
            shapes: every expected tensor's name and shape.
            tied: whether lm_head.weight, where it is stored at all, must equal model.embed_tokens.weight.
        """
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        if tied and head in self._handles:
            # Some writers keep both names, some only the head's.
            self._handles.setdefault(embedding, None)
            handle, alias = self._handles[embedding], self._handles.pop(head)
            if handle is None:
                self._handles[embedding] = _Renamed(alias, head)
                self._places[embedding] = self._places[head]
            elif not _equal(self._places[embedding], self._places[head]):
                raise InputError(
                    f"{self.folder} ties its embeddings (tie_word_embeddings in config.json), but lm_head.weight "
                    "differs from model.embed_tokens.weight: set tie_word_embeddings to false in config.json."
                )
        found = {name for name in self._handles if not name.endswith("rotary_emb.inv_freq")}
        wrong, odd = [], []
        for name in sorted(found & shapes.keys()):
            view = self._handles[name].get_slice(name)
            if tuple(view.get_shape()) != shapes[name]:
                wrong.append(f"{name} is {view.get_shape()} instead of {list(shapes[name])}")
            elif view.get_dtype() not in _DTYPES:
                odd.append(f"{name} is {view.get_dtype()}")
        problems = {
            "missing": [name for name in shapes if name not in found],
            "unexpected": sorted(found - shapes.keys()),
            "of another shape": wrong,
            f"of a type other than {', '.join(_DTYPES)}": odd,
        }
        told = "; ".join(
            f"{len(names)} {what} ({listed(names)})" for what, names in problems.items() if names
        )
        if told:
            raise InputError(
                f"the tensors in {self.folder} are not those that its config.json describes: {told}.\n"
                "The weights and config.json must belong together and be complete: download or save the model again."
            )

    def dtypes(self, names: Collection[str]) -> dict[str, np.dtype]:
        """The dtype of each of these tensors, in the order in which the files hold them (after `check`)."""
        return {
            name: np.dtype(_DTYPES[handle.get_slice(name).get_dtype()])
            for name, handle in self._handles.items()
            if name in names
        }

    def read(self, name: str, part: Part | None = None) -> np.ndarray:
        """A stored tensor, or a part of it."""
        view = self._handles[name].get_slice(name)
        if part is None:
            return self._handles[name].get_tensor(name)
        if all(bounds == (0, size) for bounds, size in zip(part, view.get_shape(), strict=True)):
            return self._handles[name].get_tensor(name)
        rows, *others = part
        return self._places[name].rows(*rows)[:, *(slice(*bounds) for bounds in others)]


class _Renamed:
    """A handle in which one tensor goes by whatever name it is asked for."""

    def __init__(self, handle: Any, name: str):
        self._handle, self._name = handle, name

    def get_slice(self, _: str) -> Any:
        return self._handle.get_slice(self._name)

    def get_tensor(self, _: str) -> np.ndarray:
        return self._handle.get_tensor(self._name)


class _Place(NamedTuple):
    """Where a tensor lies: its rows can be read by themselves, where safetensors' own slices read it whole.

    Attributes:
        file: that holds it. start: the byte at which it begins.
        dtype: as safetensors writes it. shape: of the tensor.
    """

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    def rows(self, first: int, end: int) -> np.ndarray:
        _, *sizes = self.shape
        dtype, row = np.dtype(_DTYPES[self.dtype]), math.prod(sizes)
        offset = self.start + first * row * dtype.itemsize
        return np.fromfile(self.file, dtype, (end - first) * row, offset=offset).reshape(-1, *sizes)


def _places(file: Path) -> dict[str, _Place]:
    """By name, for all tensors of a safetensors file: its header, behind eight bytes of that one's length."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    return {
        name: _Place(file, 8 + size + of["data_offsets"][0], of["dtype"], tuple(of["shape"]))
        for name, of in header.items()
        if name != "__metadata__"
    }


def _equal(one: _Place, other: _Place, rows: int = 8192) -> bool:
    """Whether two stored matrices are the same, read a few rows at a time."""
    if one.shape != other.shape:
        return False
    end = one.shape[0]
    parts = ((start, min(start + rows, end)) for start in range(0, end, rows))
    return all(np.array_equal(one.rows(*part), other.rows(*part)) for part in parts)


def listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: model.safetensors, or else those that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index} has no weight_map: download or save the model again.")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise InputError(
                f"{index} names files that are not there: {listed(missing)}. Download or copy them into {folder}."
            )
        return [folder / name for name in names]
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder} has its weights only as pickle files ({listed(pickles)}), which can run code: they are "
            "not read.\nConvert them once: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)."
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    found = f"only {listed(others)}" if others else "no safetensors"
    raise InputError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json ({found}); the weights must be in "
        "Hugging Face's safetensors format."
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an InputError says what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object.")
    return value
