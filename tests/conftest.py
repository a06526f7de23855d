"""What every test stands on: eight simulated CPU devices, no network, caches of its own, shapes that are checked."""

import atexit
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
from filelock import FileLock

# All of this has to be set before jax, transformers or datasets are imported, and holds for child processes too.
_CACHES = tempfile.mkdtemp(prefix="jaxlora-tests-")
atexit.register(shutil.rmtree, _CACHES, ignore_errors=True)
ROOT = Path(__file__).resolve().parent.parent
# Compiling is most of what these tests do, and each program runs a few times: without LLVM's optimisations and without
# the emitters that go through MLIR it takes a third of the time. Flags that are given come later, and win; what is said
# about a program's memory is said of the program that a user gets (the fixture `usual_fusions`).
_XLA_FLAGS = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
    )
)
os.environ |= {
    # Scripts that a test starts find the package, installed or not.
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    "JAX_PLATFORMS": "cpu",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "XLA_FLAGS": f"{_XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip(),
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": f"{_CACHES}/huggingface",
    "XDG_CACHE_HOME": _CACHES,
}

import beartype  # noqa: E402
import hypothesis  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Every annotated function and dataclass of the rooms that hold arrays is checked at every call: dtypes, ranks, letters
# that agree. An int passes for a float, as Python's own typing says. config/ checks by itself what a person gives.
_checker = types.ModuleType("jaxlora_tests_checker")
_checker.check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # pyright: ignore
sys.modules[_checker.__name__] = _checker
install_import_hook(
    [f"jaxlora.{room}" for room in ("core", "data", "models", "lora", "parallel", "training", "sweeps")],
    f"{_checker.__name__}.check",
)

# The same examples every time, and no deadline: a compilation inside an example is not a slow example.
hypothesis.settings.register_profile("jaxlora", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("jaxlora")

_REAL = Path(os.environ.get("JAXLORA_REAL", ROOT.parent / "shared" / "real"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks whatever uses the `real` fixture, so that `-m real` and `-m "not real"` miss nothing."""
    for item in items:
        if "real" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real models, tokenizers and data; the test is skipped where it is absent."""
    if not _REAL.is_dir():
        pytest.skip(f"no real data at {_REAL} (set JAXLORA_REAL)")
    return _REAL


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root: configs/, README.md, and where commands are run."""
    return ROOT


@pytest.fixture(scope="session")
def smollm2(real, request) -> Path:
    """A folder of SmolLM2-135M-Instruct: $JAXLORA_SMOLLM2, or built once into pytest's cache (needs the network)."""
    given = os.environ.get("JAXLORA_SMOLLM2")
    if given:
        return Path(given)
    folder = Path(request.config.cache.mkdir("smollm2"))
    with FileLock(folder / ".lock"):  # tests run in several workers
        if not (folder / "complete").is_file():
            command = [sys.executable, str(real / "make_smollm2.py"), str(folder)]
            built = subprocess.run(command, capture_output=True, text=True, check=False)
            if built.returncode:
                pytest.skip(f"SmolLM2 could not be built: {built.stderr.strip().splitlines()[-1]}")
            (folder / "complete").touch()
    return folder


@pytest.fixture
def usual_fusions(monkeypatch):
    """What a test lowers and compiles is fused as a user's programs are, and has their buffers."""
    from jax.stages import Lowered  # not before the settings above

    compile_quickly = Lowered.compile

    def compile_as_usual(lowered, compiler_options=None, **kwargs):
        options = {"xla_cpu_use_fusion_emitters": True, **(compiler_options or {})}
        return compile_quickly(lowered, compiler_options=options, **kwargs)

    monkeypatch.setattr(Lowered, "compile", compile_as_usual)


@pytest.fixture
def full_disk():
    """A context in which no file grows beyond so many bytes: writing more fails as it does on a full disk."""

    @contextlib.contextmanager
    def limit(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit
