"""How programs are compiled: options each backend needs, and the cache that survives the process."""

import os
from pathlib import Path


def compiler_options(platform: str, *, once: bool = False) -> dict[str, str]:
    """Options for `lowered.compile(compiler_options=...)` or `jax.jit(..., compiler_options=...)`.

    XLA's CPU backend slices bfloat16 arrays by way of float32, and then moves that conversion out of the scan over
    layers: the whole base would stand in memory a second time, twice as wide. Without that one pass each layer is
    converted as it is sliced (0.5B shape, [8, 1024]: 1.7 GB less, and no slower).

    Args:
        platform: "cpu", "gpu", "tpu".
        once: for a program that runs once, and is not worth LLVM's longest look: drawing an adapter's numbers compiles
            in a third of the time, and gives the same ones.
    """
    if platform != "cpu":
        return {}
    options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    return options | ({"xla_backend_optimization_level": "2"} if once else {})


def use_persistent_cache() -> Path:
    """Turns on JAX's compilation cache in the user's cache folder, or where JAX_COMPILATION_CACHE_DIR says.

    Returns:
        The folder.
    """
    import jax

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(folder) if folder else Path(home) / "jaxlora" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return path
