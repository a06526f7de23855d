"""Adapters as PEFT folders: adapter_config.json and adapter_model.safetensors, which peft and vLLM load as they are."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  numpy learns the name bfloat16, by which safetensors asks for it
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from jaxlora.core.errors import InputError
from jaxlora.core.tree import Path as TreePath
from jaxlora.core.tree import leaves, unflatten
from jaxlora.lora.spec import TARGETS, LoraSpec
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.tensors import listed, read_json
from jaxlora.models.weights import param_shapes

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model.model."  # PeftModel, the model for causal language modelling, the decoder in it
_SUFFIXES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
_TENSOR = re.compile(
    re.escape(_PREFIX) + rf"layers\.\d+\.\w+\.(\w+)\.({'|'.join(map(re.escape, _SUFFIXES.values()))})"
)

# Settings that say nothing about what is computed from the tensors. Any other one that is set is refused: PEFT gains
# new variants often, and an adapter that is taken for something else scores wrongly without a word.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "loftq_config", "lora_alpha", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
_REASONS = {
    "modules_to_save": "fully trained modules beside the adapter are not supported",
    "rank_pattern": "only adapters with one rank for all modules are read; fill the others up with zeros",
    "alpha_pattern": "only adapters with one alpha for all modules are read; multiply what differs into lora_B",
    "layers_to_transform": "only adapters on all layers are supported",
    "trainable_token_indices": "adapters on the embeddings are not supported",
}
# The other initialisations of PEFT subtract the initial product from the base's weights.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_peft(
    folder: str | Path, adapter: Mapping[str, Any], spec: LoraSpec, base_name: str, base_revision: str = ""
) -> None:
    """Writes an adapter as a PEFT folder; the same adapter gives the same bytes.

    Written beside the folder and renamed into it, so that a process killed at any moment leaves the old adapter or the
    new one. (Only where an adapter with other settings is replaced, the weights may be left missing, never mixed.)
    Other files in the folder stay.

    Args:
        folder: created with its parents.
        adapter: unscaled float32 pairs a [L, in, R], b [L, R, out] by path, with DoRA magnitudes m [L, out].
        spec: its constants, with one rank (see `variants.ordinary`).
        base_name, base_revision: the base that it belongs to: hub id or folder, and commit.
    """
    tensors = {}
    for path, leaf in leaves(adapter):
        stacked = np.asarray(jax.device_get(leaf), np.float32)
        for layer, matrix in enumerate(stacked):
            tensors[_tensor_name(path, layer)] = np.ascontiguousarray(
                matrix.T
            )  # a vector is its own transpose
    config = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        # vLLM wants an integer wherever the value is one.
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": spec.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": {},
        "revision": base_revision or None,
        "target_modules": sorted(spec.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": spec.use_dora,
        "use_rslora": spec.scaling == "rslora",
    }
    _replace(
        Path(folder), (json.dumps(config, indent=2) + "\n").encode(), save(tensors, metadata={"format": "pt"})
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """The adapter_config.json of a PEFT folder.

    Raises:
        InputError: the folder or the file is missing, or is no adapter's.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if not path.is_file():
        problem = f"has no {CONFIG_FILE}" if folder.is_dir() else "does not exist"
        raise InputError(
            f"the adapter folder {folder} {problem}; give a folder that save_pretrained of PEFT or a run left."
        )
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path} has peft_type {config.get('peft_type')!r}; only LORA is supported.")
    return config


def load_peft(folder: str | Path, decoder_spec: DecoderSpec) -> tuple[dict[str, Any], LoraSpec]:
    """Reads a PEFT folder for a base of the given spec.

    Args:
        folder: written by `save_peft` or by PEFT.
        decoder_spec: of the base that the adapter is to sit on.
    Returns:
        (adapter, spec): unscaled float32 NumPy pairs a [L, in, R], b [L, R, out] by path, with DoRA magnitudes
            m [L, out], and their constants.
    Raises:
        InputError: not an adapter, a variant of LoRA that is not supported, or tensors that do not fit the base.
    """
    folder = Path(folder)
    config = read_config(folder)
    _refuse_variants(folder, config)
    tensors = _read_tensors(folder)
    strange = sorted(name for name in tensors if not _is_part(name, bool(config.get("use_dora"))))
    if strange:
        raise InputError(
            f"the adapter in {folder} has tensors that are not LoRA pairs of the projections {', '.join(TARGETS)}: "
            f"{listed(strange)}. Embeddings, heads and other modules are not supported."
        )
    targets = {match[1] for match in map(_TENSOR.fullmatch, tensors) if match}
    named = config.get("target_modules")
    if isinstance(named, list):
        targets |= {str(name).split(".")[-1] for name in named}
    for key, kinds in {"r": int, "lora_alpha": (int, float), "lora_dropout": (int, float)}.items():
        if not isinstance(config.get(key), kinds):
            raise InputError(f"{folder / CONFIG_FILE} has {key} {config.get(key)!r}; it must be a number.")
    try:
        spec = LoraSpec(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config["lora_dropout"],
            targets=tuple(sorted(targets)),
            scaling="rslora" if config.get("use_rslora") else "alpha/r",
            use_dora=bool(config.get("use_dora")),
        )
    except InputError as error:
        raise InputError(f"{folder / CONFIG_FILE}: {error}") from error
    shapes = _shapes(decoder_spec, spec)
    _check_tensors(folder, tensors, shapes, decoder_spec)
    adapter = {
        path: np.stack([tensors[_tensor_name(path, layer)].T for layer in range(shape[0])]).astype(np.float32)
        for path, shape in shapes.items()
    }
    return unflatten(adapter), spec


def _tensor_name(path: TreePath, layer: int) -> str:
    """layers/self_attn/q_proj/a of layer 3 -> base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"""
    stack, *module, leaf = path
    return f"{_PREFIX}{stack}.{layer}.{'.'.join(module)}.{_SUFFIXES[leaf]}"


def _is_part(name: str, use_dora: bool) -> bool:
    match = _TENSOR.fullmatch(name)
    return match is not None and match[1] in TARGETS and (use_dora or match[2] != _SUFFIXES["m"])


def _shapes(decoder_spec: DecoderSpec, spec: LoraSpec) -> dict[TreePath, tuple[int, ...]]:
    """The shape of every leaf of an adapter, by path."""
    shapes = {}
    for path, shape in param_shapes(decoder_spec).items():
        if path[-1] == "kernel" and path[-2] in spec.targets:
            layers, fan_in, fan_out = shape
            shapes[(*path[:-1], "a")] = (layers, fan_in, spec.rank)
            shapes[(*path[:-1], "b")] = (layers, spec.rank, fan_out)
            if spec.use_dora:
                shapes[(*path[:-1], "m")] = (layers, fan_out)
    return shapes


def _refuse_variants(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses every setting that makes the adapter something else than x W + scale x a b on all layers."""
    path = folder / CONFIG_FILE
    if config.get("bias", "none") != "none":
        raise InputError(f"{path} has bias {config['bias']!r}; only adapters with bias 'none' are supported.")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise InputError(f"{path} has task_type {config['task_type']!r}; only CAUSAL_LM is supported.")
    initialisation = config.get("init_lora_weights", True)
    if initialisation not in _INITIALISATIONS:
        raise InputError(
            f"{path} has init_lora_weights {initialisation!r}, which changes the base's weights too. Save it in PEFT "
            "with path_initial_model_for_weight_conversion: that makes an ordinary adapter of it."
        )
    for key in sorted(config.keys() - _HARMLESS - {"bias", "init_lora_weights"}):
        if config[key]:
            reason = _REASONS.get(key, "this variant of LoRA is not supported")
            raise InputError(f"{path} has {key} {config[key]!r}: {reason}.")


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        remedy = "adapter_model.bin is a pickle, which can run code and is not read: save the adapter again with PEFT."
        raise InputError(
            f"{folder} has no {WEIGHTS_FILE}; {remedy if pickled else 'copy or save the adapter again.'}"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); it is cut short or no safetensors file."
        ) from error


def _check_tensors(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[TreePath, tuple[int, ...]],
    decoder_spec: DecoderSpec,
) -> None:
    """Refuses an adapter whose tensors are not exactly those that the base and the adapter's config ask for."""
    expected = {
        _tensor_name(path, layer): shape[:0:-1] for path, shape in shapes.items() for layer in range(shape[0])
    }
    wrong = [
        f"{name.removeprefix(_PREFIX)} is {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = {
        "missing": [name.removeprefix(_PREFIX) for name in expected if name not in tensors],
        "unexpected": sorted(name.removeprefix(_PREFIX) for name in tensors if name not in expected),
        "of another shape": wrong,
    }
    told = "; ".join(f"{len(names)} {what} ({listed(names)})" for what, names in problems.items() if names)
    if told:
        raise InputError(
            f"the adapter in {folder} does not fit this base ({decoder_spec.model_type}, "
            f"{decoder_spec.num_layers} layers, hidden size {decoder_spec.hidden_size}): {told}.\n"
            "Use it with the base that it was trained on."
        )


def _replace(folder: Path, config: bytes, weights: bytes) -> None:
    """Puts the two files in the folder in such an order that a reader never sees one adapter's config and another's
    weights."""
    aside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    aside.mkdir(parents=True)
    try:
        for name, content in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights)):
            with open(aside / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk needs the room
        raise
    if not folder.exists():
        os.rename(aside, folder)
        return
    if not (folder / CONFIG_FILE).is_file() or (folder / CONFIG_FILE).read_bytes() != config:
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)
        os.replace(aside / CONFIG_FILE, folder / CONFIG_FILE)
    os.replace(aside / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    shutil.rmtree(aside)
