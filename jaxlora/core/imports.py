"""What a command's libraries need not import."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

ASKING = ("datasets", "transformers")  # whether torch is there, once, at their import


@contextmanager
def without_torch() -> Iterator[None]:
    """While open, datasets and transformers are imported as if torch were not installed; others may import it.

    transformers imports torch wherever it finds it, for models; only its tokenizers serve here. That takes a second and
    180 MB, and has no switch (transformers 5). It asks once in a process, so this decides for the whole of one: it is
    for commands, and takes nothing from those who use the package as a library, perhaps beside torch.
    """
    # Said at its import, and of no use to anyone here: that models are not available without torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """Finds the modules that ask, as Python would, and has them loaded while torch is hidden."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in ASKING else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                with _hidden("torch"):
                    load(module)

            spec.loader.exec_module = exec_module
        return spec


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # what Python takes for "there is none"
    try:
        yield
    finally:
        if sys.modules.get(name, ...) is None:
            del sys.modules[name]
