"""Checkpoints: the same bits back, whatever the state's shape and place, and no damage that goes unnoticed."""

import asyncio
import functools
import gc
import json
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.core.errors import InputError
from jaxlora.runs.checkpoints import Checkpoints


class State(NamedTuple):
    step: jax.Array
    adapter: Any
    opt_state: Any


def make_state(seed: int, width: int = 32) -> State:
    adapter = {
        "q_proj": {"a": jax.random.normal(jax.random.key(seed), (2, width, 4)), "b": jnp.zeros((2, 4, 3))}
    }
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(adapter)
    return State(jnp.asarray(seed, jnp.int32), adapter, opt_state)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def data_files(step_folder: Path) -> list[Path]:
    return [file for file in step_folder.rglob("*") if file.is_file() and file.parent.name == "d"]


def test_any_state_comes_back_bit_for_bit_with_its_host_dict(tmp_path):
    odd = {
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf, -jnp.inf]),
        "bf16": jnp.arange(7, dtype=jnp.bfloat16),
        "f16": jnp.ones((2, 3), jnp.float16),
        "int8": jnp.array([-3, 5], jnp.int8),
        "bool": jnp.array([True, False]),
        "uint32": jnp.asarray(2**32 - 1, jnp.uint32),
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "nested": [make_state(3), (), {"deep.er": {"x": jnp.ones(())}}],
    }
    host = {"best": 1.25, "patience": 2, "started": None, "history": [1, 2], "worst": float("inf")}
    with Checkpoints(tmp_path) as saving:
        saving.save(7, odd, host)
    with Checkpoints(tmp_path) as restoring:
        for like in (odd, jax.eval_shape(lambda: odd)):
            restored = restoring.restore(like)
            assert restored is not None
            assert (restored.step, restored.host, restored.skipped) == (7, host, [])
            assert jax.tree.structure(restored.state) == jax.tree.structure(odd)
            assert bits(restored.state) == bits(odd)
            assert [x.dtype for x in jax.tree.leaves(restored.state)] == [
                x.dtype for x in jax.tree.leaves(odd)
            ]


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x * 2 + 1, state), donate_argnums=0)
    state = {str(i): jax.random.normal(jax.random.key(i), (500, 501)) for i in range(8)}
    wanted = {}
    with Checkpoints(tmp_path, keep=6) as checkpoints:
        for step in range(1, 7):
            wanted[step] = bits(jax.tree.map(lambda x: np.array(x, copy=True), state))
            like = jax.eval_shape(lambda state=state: state)
            checkpoints.save(step, state)
            for _ in range(4):
                state = advance(state)
        for step in range(1, 7):
            restored = checkpoints.restore(like, step=step)
            assert restored is not None
            assert bits(restored.state) == wanted[step]


def test_a_sharded_state_comes_back_on_any_mesh(tmp_path):
    devices = np.array(jax.devices()[:8])
    state = {"w": jax.random.normal(jax.random.key(0), (3, 16, 8)), "step": jnp.zeros((), jnp.int32)}

    def place(shape: tuple[int, ...], spec: PartitionSpec) -> dict[str, jax.Array]:
        mesh = jax.sharding.Mesh(devices[: np.prod(shape)].reshape(shape), ("x", "y")[: len(shape)])
        placed = {"w": NamedSharding(mesh, spec), "step": NamedSharding(mesh, PartitionSpec())}
        return jax.device_put(state, placed)

    saved = place((8,), PartitionSpec(None, "x"))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved)
        for like in (saved, place((2, 2), PartitionSpec(None, "y", "x")), state):
            restored = checkpoints.restore(like)
            assert restored is not None
            assert bits(restored.state) == bits(state)
            assert restored.state["w"].sharding.is_equivalent_to(like["w"].sharding, 3)


def test_the_newest_few_are_kept_and_those_that_are_needed(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, make_state(step), kept={0, 1, min(step, 3)})  # there is no step 0
        assert checkpoints.steps() == [1, 3, 5, 6]
    with Checkpoints(tmp_path, keep=2) as reopened:
        reopened.save(7, make_state(7), kept=[3, 5])
        assert reopened.steps() == [3, 5, 6, 7]
        reopened.save(8, make_state(8), kept={8})
        reopened.save(9, make_state(9), kept={8})
        reopened.save(10, make_state(10), kept={8})
        assert reopened.steps() == [8, 9, 10]
        reopened.save(11, make_state(11))
        assert reopened.steps() == [10, 11]


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path):
    """Its content named the best step, and nothing else that is kept."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(5), {"n": 1})
    file = tmp_path / "5" / "host" / "metadata"
    content = json.loads(file.read_text())
    old = {"host": content["host"], "best": 5, "leaves": content["leaves"]}
    checksum = zlib.crc32(json.dumps(old, sort_keys=True).encode())
    for written, step in ((old | {"checksum": checksum}, 5), (old | {"best": 4, "checksum": checksum}, None)):
        file.write_text(json.dumps(written))
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            restored = checkpoints.restore(make_state(0))
            assert (restored and restored.step) == step, checkpoints.skipped


def test_a_step_saved_twice_holds_the_later_state(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {"n": 1})
        checkpoints.save(2, make_state(2), {"n": 1})
        checkpoints.wait()
        before = (tmp_path / "2" / "host").stat().st_mtime_ns
        checkpoints.save(2, make_state(2), {"n": 1})
        checkpoints.wait()
        assert (tmp_path / "2" / "host").stat().st_mtime_ns == before  # the same: not written again
        checkpoints.save(2, make_state(9), {"n": 2}, kept={2})
        assert checkpoints.problems() == []
        restored = checkpoints.restore(make_state(0))
        assert restored is not None
        assert (restored.step, restored.host) == (2, {"n": 2})
        assert bits(restored.state) == bits(make_state(9))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "2"]


def test_a_replacement_that_was_interrupted_is_undone(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, make_state(4))
    (tmp_path / "4").rename(tmp_path / "4.superseded")  # killed after this, before the new one was complete
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored = checkpoints.restore(make_state(0))
        assert restored is not None
        assert restored.step == 4


def test_later_checkpoints_can_be_dropped(tmp_path):
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, make_state(step), kept={2, 4})
        checkpoints.truncate(after_step=3)
        assert checkpoints.steps() == [1, 2, 3]
        for step in range(4, 10):
            checkpoints.save(step, make_state(step), kept={2})
        assert checkpoints.steps() == [2, 5, 6, 7, 8, 9]


def test_an_empty_folder_restores_nothing(tmp_path):
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.restore(make_state(0)) is None
        assert checkpoints.skipped == []


def test_another_state_is_refused_by_name_and_stays(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
        with pytest.raises(
            InputError, match=r"adapter.q_proj.a is float32\[2, 32, 4\] there and float32\[2, 16, 4\]"
        ):
            checkpoints.restore(make_state(1, width=16))
        with pytest.raises(InputError, match=r"extra is missing there and int32\[\] here"):
            checkpoints.restore({**make_state(1)._asdict(), "extra": jnp.zeros((), jnp.int32)})
        assert checkpoints.steps() == [1]


def test_only_arrays_of_numbers_can_be_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="x is float"):
            checkpoints.save(1, {"x": 1.0})
        with pytest.raises(TypeError, match="x is"):
            checkpoints.save(1, {"x": jax.random.key(0)})


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(10, make_state(10), {"n": 10})
        checkpoints.save(20, make_state(20), {"n": 20})
    return folder


def flip(file: Path, position: float) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[int(position * (len(content) - 1))] ^= 0x10
    file.write_bytes(content)


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "missing": lambda file: file.unlink(),
    **{f"flipped at {at}": functools.partial(flip, position=at) for at in (0.02, 0.5)},
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged_no_wrong_state_is_ever_restored(two_saved, tmp_path, damage):
    names = sorted(
        str(file.relative_to(two_saved)) for file in (two_saved / "20").rglob("*") if file.is_file()
    )
    assert len(names) > 5
    passed_over = set()
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(two_saved, folder)
        DAMAGES[damage](folder / name)
        with Checkpoints(folder) as checkpoints:
            restored = checkpoints.restore(make_state(0))
            assert restored is not None, name
            assert bits(restored.state) == bits(make_state(restored.step)), name
            assert restored.host == {"n": restored.step}, name
            if restored.step == 10:
                passed_over.add(name)
                assert len(restored.skipped) == len(checkpoints.skipped)
            if name not in ("20/host/metadata", "20/_CHECKPOINT_METADATA", "20/state/manifest.ocdbt"):
                continue
            checkpoints.save(20, make_state(20), {"n": 20})  # the step can be saved again
            checkpoints.save(30, make_state(30))
            assert checkpoints.problems() == [], name
            assert checkpoints.steps()[-2:] == [20, 30], name
    if "flipped" not in damage:  # a flipped bit may hit bytes that mean nothing
        assert "20/host/metadata" in passed_over
        assert passed_over & {str(file.relative_to(two_saved)) for file in data_files(two_saved / "20")}


def test_a_damaged_checkpoint_is_told_once_and_cleared_by_the_next_good_save(two_saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two_saved, folder)
    (folder / "20" / "host" / "metadata").write_text("{")
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(make_state(0))
        assert restored is not None
        assert restored.step == 10
        assert len(restored.skipped) == 1
        assert restored.skipped[0].startswith(f"checkpoint {folder / '20'} is damaged (")
        assert checkpoints.steps() == [10]
        again = checkpoints.restore(make_state(0))
        assert again is not None
        assert again.skipped == []
        assert (folder / "20.damaged").exists()
        checkpoints.save(15, make_state(15))
        checkpoints.wait()
        assert not (folder / "20.damaged").exists()


def test_when_every_checkpoint_is_damaged_nothing_is_restored_and_all_are_told(two_saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two_saved, folder)
    for step in (10, 20):
        shutil.rmtree(folder / str(step) / "state")
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(make_state(0)) is None
        assert len(checkpoints.skipped) == 2


def test_a_save_that_finds_the_disk_full_is_told_and_harms_nothing(tmp_path, full_disk):
    big = {"w": jax.random.normal(jax.random.key(0), (300, 300))}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, big)
        checkpoints.wait()
        for step in (2, 3):
            with full_disk(10_000):
                checkpoints.save(step, big, kept={step})
                checkpoints.wait()
            (problem,) = checkpoints.problems()
            assert f"the checkpoint of step {step} could not be saved" in problem
            assert "File too large" in problem
            assert "untouched" in problem
            assert checkpoints.problems() == []
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1"]  # no remains that fill the disk
        restored = checkpoints.restore(big)
        assert restored is not None
        assert restored.step == 1
        checkpoints.save(3, big, kept={1})
        assert checkpoints.problems() == []
        assert checkpoints.steps() == [1, 3]


def test_a_real_full_disk(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        small, big = {"w": jnp.ones(10)}, {"w": jax.random.normal(jax.random.key(0), (1000, 1000))}
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            checkpoints.save(1, small)
            checkpoints.save(2, big)
            checkpoints.wait()
            (problem,) = checkpoints.problems()
            assert "step 2" in problem
            assert "No space left on device" in problem
            checkpoints.save(3, small)
            assert checkpoints.steps() == [1, 3]
            assert checkpoints.problems() == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_what_a_failed_save_writes_late_goes_with_the_next_whole_one(tmp_path):
    """Its threads may end after it has, and make the folder that was removed once more."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)})
        checkpoints.wait()
        late = tmp_path / "2.orbax-checkpoint-tmp" / "state"
        late.mkdir(parents=True)
        (late / "d").write_bytes(b"late")
        checkpoints.save(3, {"x": jnp.ones(3)})
        checkpoints.wait()
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "3"]


def test_a_folder_that_cannot_be_made_is_told_and_does_not_raise(tmp_path):
    (tmp_path / "file").touch()
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    checkpoints.save(1, make_state(1))
    assert "step 1 could not be saved" in checkpoints.problems()[0]
    checkpoints.close()


def test_what_orbax_abandons_is_not_heard_of(tmp_path, caplog):
    """What has failed leaves futures behind, whose errors asyncio logs when they are collected."""
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == []

    async def abandon(error: str) -> None:
        asyncio.get_running_loop().create_future().set_exception(ValueError(error))

    for error in ("NOT_FOUND [tensorstore_spec='{}']", "in 18.orbax-checkpoint-tmp/state", "anybody else's"):
        asyncio.run(abandon(error))
        gc.collect()
    (record,) = caplog.records
    assert "anybody else's" in record.getMessage()


def test_jax_hears_of_steps_in_the_order_of_the_loop(tmp_path, monkeypatch):
    """Orbax asks about a step again when it is saved, late: JAX would take the loop to be there."""
    asked = []

    def ask(manager, step):
        asked.append(step)
        return step == 7

    monkeypatch.setattr(orbax.checkpoint.CheckpointManager, "reached_preemption", ask)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, make_state(3))
        assert not checkpoints.reached_preemption(6)
        checkpoints.wait()
        assert checkpoints.reached_preemption(7)
        checkpoints.save(7, make_state(7))
    assert asked == [6, 7]


def test_at_least_one_is_kept():
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints("x", keep=0)
