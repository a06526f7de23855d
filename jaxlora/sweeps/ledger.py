"""sweep.json: what a sweep knows beside the folders of its trials; replaced whole at each change."""

import json
from pathlib import Path
from typing import Any

from jaxlora.core.errors import InputError
from jaxlora.runs.files import LOCK, encode_json, replace

LEDGER = "sweep.json"


def read(folder: Path) -> dict[str, Any]:
    """What the file says; {} where there is none yet.

    Raises:
        InputError: it is no JSON object.
    """
    try:
        found = json.loads((folder / LEDGER).read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(
            f"{folder / LEDGER} is not valid JSON ({error}); restore it, or give another --workdir"
        ) from None
    if not isinstance(found, dict):
        raise InputError(
            f"{folder / LEDGER} does not hold a JSON object; restore it, or give another --workdir"
        )
    return found


def update(folder: Path, **fields: Any) -> dict[str, Any]:
    """Sets fields, leaves the others, and returns all."""
    found = read(folder) | json.loads(encode_json(fields))
    replace(folder / LEDGER, encode_json(found, indent=2))
    return found


def check_is_sweep_or_empty(folder: Path) -> None:
    """Refuses a folder that holds something else.

    Raises:
        InputError: naming what it holds.
    """
    if not folder.exists() or (folder / LEDGER).exists():
        return
    others = sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK)
    if others:
        what = "holds a run, not a sweep" if "config.json" in others else "is not empty and holds no sweep"
        raise InputError(f"{folder} {what} (it has {', '.join(others[:3])}): give another --workdir")
