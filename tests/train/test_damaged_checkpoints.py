"""Every file of a real run's checkpoint, cut short, gone, or with one bit turned: only what was saved is restored."""

import collections
import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlora.runs.checkpoints import Checkpoints

FLIPS = 3  # single bits a file, at random places
CUTS = {
    "empty": 0.0,
    "a third": 1 / 3,
    "all but a byte": 1.0,
}  # the share of the bytes, less one, that is left


def like(step_folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """What the checkpoint says that it holds, by name."""
    leaves = json.loads((step_folder / "host" / "metadata").read_text())["leaves"]
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape, _) in leaves.items()}


def bits(state: dict[str, jax.Array]) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in state.items()}


def damages(content: bytes, chance: random.Random) -> dict[str, bytes | None]:
    """What may become of a file, by kind; None for a file that is gone."""
    found: dict[str, bytes | None] = {"gone": None}
    if content:
        found |= {
            f"cut to {left}": content[: int(share * (len(content) - 1))] for left, share in CUTS.items()
        }
    for flip in range(FLIPS if content else 0):
        turned = bytearray(content)
        turned[chance.randrange(len(turned))] ^= 1 << chance.randrange(8)
        found[f"bit {flip}"] = bytes(turned)
    return found


@pytest.mark.slow
def test_no_damage_to_any_file_of_a_checkpoint_goes_unnoticed(run, tmp_path, caplog):
    """Passed over for the one before, in a line; or of no consequence, such as a note of when it was written."""
    folder = Path(shutil.copytree(run("plain") / "checkpoints", tmp_path / "checkpoints"))
    steps = sorted(int(entry.name) for entry in folder.iterdir())
    newest, before = steps[-1], steps[-2]
    wanted = like(folder / str(newest))
    with Checkpoints(folder, read_only=True) as checkpoints:
        intact = {step: checkpoints.restore(wanted, step) for step in (newest, before)}
    expected = {step: (bits(found.state), found.host) for step, found in intact.items() if found}
    assert expected[newest] != expected[before]

    chance, counts = random.Random(3), collections.Counter()
    data = (
        folder / str(newest) / "state" / "d"
    )  # all arrays; Orbax also leaves what it gathered them from, unread
    files = sorted(file for file in (folder / str(newest)).rglob("*") if file.is_file())
    for file in files:
        content = file.read_bytes()
        for kind, damaged in damages(content, chance).items():
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with Checkpoints(folder, read_only=True) as checkpoints:
                restored = checkpoints.restore(wanted)
            name = f"{file.relative_to(folder)}, {kind}"
            assert restored is not None, name
            assert (bits(restored.state), restored.host) == expected[restored.step], name
            if restored.step == newest:
                assert restored.skipped == [], name
                assert kind.startswith("bit") or file.parent != data, name
            else:
                (line,) = restored.skipped
                assert line.startswith(f"checkpoint {folder / str(newest)} is damaged ("), name
                assert "\n" not in line, name
            counts[kind.rstrip("0123456789 "), restored.step == newest] += 1
            file.write_bytes(content)
    print(f"{sum(counts.values())} damages to {len(files)} files; (kind, of no consequence): {dict(counts)}")
    assert sum(counts.values()) >= 100
    assert {kind for kind, noticed in counts if not noticed} >= {
        "gone",
        "bit",
        *(f"cut to {cut}" for cut in CUTS),
    }
    assert caplog.records == []  # the line says it all
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.restore(wanted).step == newest  # type: ignore[union-attr]
