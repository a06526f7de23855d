"""What an export is made of: the base, looked at but not loaded, and the adapter.

Accelerators are left alone, but for the evaluation of an average.
"""

from typing import Any

from jaxlora.config.build.chosen import Chosen, load
from jaxlora.core.errors import InputError
from jaxlora.lora.peft import load_peft
from jaxlora.lora.spec import LoraSpec
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import ModelFiles, resolve_model
from jaxlora.runs.progress import Progress


def base(chosen: Chosen, weights: bool) -> tuple[ModelFiles, DecoderSpec]:
    """Finds the base.

    Args:
        chosen: what is exported.
        weights: whether an adapter is to be merged into it.
    Raises:
        InputError: it is not there, or none that adapters sit on.
    """
    adapter = chosen.folder or (chosen.run.best if chosen.run else "FOLDER")
    elsewhere = f"name another copy: --adapter {adapter} --model FOLDER_OR_ID"
    quantised = [
        f"{what} in {kind} ({key})"
        for what, kind, key in (
            ("kernels", chosen.quantize, "model.quantize"),
            ("embeddings", chosen.quantize_embeddings, "model.quantize_embeddings"),
        )
        if kind != "none"
    ]
    if weights and quantised:
        raise InputError(
            f"{chosen.description} was trained over {' and '.join(quantised)}: merged into the base as published, it "
            "is not what was evaluated.\nExport it with --to peft; to merge it all the same, name its folder: "
            f"--to merged --adapter {chosen.folder or 'FOLDER'}."
        )
    try:
        files = resolve_model(chosen.model, chosen.revision, weights=weights)
    except InputError as error:
        raise InputError(
            f"the adapter's base cannot be had: {error}\nIf it is elsewhere now, {elsewhere}."
        ) from error
    stored = files.config.get("quantization_config")
    if stored and weights:
        raise InputError(
            f"the base {chosen.model} is quantised (quant_method {stored.get('quant_method', 'unknown')!r}): an "
            f"adapter is merged into weights as they were before that.\nTo merge it into those, {elsewhere}."
        )
    try:
        return files, DecoderSpec.from_hf(files.config)
    except InputError as error:
        raise InputError(f"the base {chosen.model}: {error}") from error


def adapter(chosen: Chosen, files: ModelFiles, spec: DecoderSpec) -> tuple[dict[str, Any], LoraSpec]:
    """Reads the adapter; only one that lies in a run's checkpoints takes JAX to read, on the CPU.

    Args:
        chosen: a run or an adapter.
        files, spec: its base.
    Raises:
        InputError: no adapter, not one for this base, or a step that is not kept.
    """
    if chosen.folder is not None:
        return load_peft(chosen.folder, spec)
    import jax
    import jax.numpy as jnp

    from jaxlora.config.build.inputs import Model
    from jaxlora.models.decoder import Decoder
    from jaxlora.parallel.mesh import make_mesh

    jax.config.update("jax_platforms", "cpu")  # the run may still be training on the accelerator
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    found = load(chosen, Model(files, spec, Decoder(spec, dtype=jnp.dtype(chosen.dtype)), mesh))
    if found is None:
        raise InputError(f"{chosen.description} has no adapter: there is nothing to export.")
    return found


def averaged(chosen: Chosen, progress: Progress) -> tuple[dict[str, Any], LoraSpec, float]:
    """Averages the adapters of a run, and evaluates their mean on its held-out data: this takes its accelerators.

    Returns:
        (adapter, spec, eval nll).
    Raises:
        InputError: base, data or a checkpoint are gone, or the evaluation does not fit.
    """
    with progress.stage("starting JAX"):
        import jax

        from jaxlora.config.build import evaluation
        from jaxlora.core.compilation import use_persistent_cache

        use_persistent_cache()
        devices = jax.devices()
    if chosen.config is None:
        raise InputError(f"{chosen.description} is no run: there is nothing to average.")
    return evaluation.averaged(chosen, chosen.config, devices, progress)
