"""Real SmolLM2 for the tests of this room."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2(real, request) -> Path:
    """A folder of SmolLM2-135M-Instruct: $JAXLORA_SMOLLM2, or built once into pytest's cache (needs the network)."""
    given = os.environ.get("JAXLORA_SMOLLM2")
    if given:
        return Path(given)
    folder = Path(request.config.cache.mkdir("smollm2"))
    if not (folder / "complete").is_file():
        command = [sys.executable, str(real / "make_smollm2.py"), str(folder)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            pytest.skip(f"SmolLM2 could not be built: {built.stderr.strip().splitlines()[-1]}")
        (folder / "complete").touch()
    return folder
