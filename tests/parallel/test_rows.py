"""The rows that a process has: all of them together are the batch, and each is counted once."""

import jax
import numpy as np
import pytest

from jaxlora.parallel import exchange
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rows import Share, placed
from jaxlora.parallel.sharding import batch_sharding

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8), (1, 2, 4)]


class Seen(Share):
    """The share of one of `count` processes that divide the devices among themselves, in their order."""

    def _held(self, count):
        whole = Share._held(self, count)
        assert len(whole) == 1
        held = np.zeros((PROCESSES, count), bool)
        for device, (rows,) in batch_sharding(self.mesh, False).devices_indices_map((count,)).items():
            held[device.id * PROCESSES // jax.device_count(), rows] = True
        return held


PROCESSES = 4


@pytest.mark.parametrize("sizes", MESHES)
def test_every_row_is_made_and_counted_once(sizes, monkeypatch):
    share, counted = Seen(make_mesh(sizes, jax.devices())), []
    for process in range(PROCESSES):
        monkeypatch.setattr(jax, "process_index", lambda *_, process=process: process)
        own = share.own(16)
        assert len(own) >= 16 // PROCESSES
        counted += own[share.counted(16)[:, 0]].tolist()
        of_step = share.of_step(3, 16)
        assert of_step.tolist() == [16 * m + row for m in range(3) for row in own]
    assert sorted(counted) == list(range(16))


@pytest.mark.parametrize("sizes", MESHES)
def test_what_is_placed_is_what_jax_places(sizes):
    mesh = make_mesh(sizes, jax.devices())
    share, host = Share(mesh), {"tokens": np.arange(48 * 5, dtype=np.int32).reshape(48, 5)}
    whole, cut = share.put(host)["tokens"], share.put(host, 3)["tokens"]
    for ours, theirs in (
        (whole, jax.device_put(host["tokens"], batch_sharding(mesh, False))),
        (cut, jax.device_put(host["tokens"].reshape(3, 16, 5), batch_sharding(mesh, True))),
        (placed(host["tokens"], batch_sharding(mesh, False)), whole),
    ):
        assert ours.sharding == theirs.sharding
        for one, other in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
            np.testing.assert_array_equal(one.data, other.data)
    np.testing.assert_array_equal(share.fetch(whole, 48), host["tokens"])


def test_alone_nothing_is_exchanged():
    assert exchange.alone()
    assert exchange.first()
    assert exchange.gathered({"a": 1}) == [{"a": 1}]
    assert exchange.from_first(lambda: 3) == 3
    array = np.array([1 / 3, 2.0])
    assert exchange.summed(array) is array
