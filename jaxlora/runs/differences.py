"""In what a run's config differs from the one in its folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FREE = ("mesh",)
"""Sections in which a run that goes on may differ: they say where it is computed, and change no result."""

SHOWN = 4
"""Differing keys named in a message before it goes on with a count."""


def differing(found: dict[str, Any], wanted: dict[str, Any], defaults: dict[str, Any]) -> Iterator[str]:
    """Yields, for each differing key that matters, a phrase with the value in the folder and the value wanted now.

    Args:
        found: the config in the folder.
        wanted: the config of now.
        defaults: nested like a config; what a key that `found` lacks was then.
    """
    found = _filled(found, defaults)
    found, wanted = ({k: v for k, v in config.items() if k not in FREE} for config in (found, wanted))
    yield from _differences(found, wanted)


def _filled(found: Any, defaults: Any) -> Any:
    """The config with what it lacks at its default."""
    if not (isinstance(found, dict) and isinstance(defaults, dict)):
        return found
    return {**defaults, **{name: _filled(value, defaults.get(name)) for name, value in found.items()}}


def _differences(found: Any, wanted: Any, key: str = "") -> Iterator[str]:
    """Yields, for each differing key, a phrase with the value in the folder and the value wanted now."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in dict.fromkeys((*found, *wanted)):
            path = f"{key}.{name}" if key else name
            if name not in wanted:
                yield f"{path} is {json.dumps(found[name])} there and unknown here"
            elif name not in found:
                yield f"{path} is missing there and {json.dumps(wanted[name])} here"
            else:
                yield from _differences(found[name], wanted[name], path)
    elif not _same(found, wanted):
        yield f"{key} is {json.dumps(found)} there and {json.dumps(wanted)} here"


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values: 1 is 1.0, but true is not 1, which Python would grant."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def another_config(folder: Path, differences: list[str]) -> str:
    shown = "; ".join(differences[:SHOWN])
    more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    return f"{folder} holds a run with another config: {shown}{more}.\nGive another --workdir, or the run's own config."
