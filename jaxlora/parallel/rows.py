"""The rows of a batch that a process makes, places and counts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlora.parallel import exchange
from jaxlora.parallel.sharding import batch_sharding, row_devices


def placed(tree: Any, placement: Any) -> Any:
    """Host arrays that every process has, placed: each device takes its part.

    Args:
        tree: arrays or numbers.
        placement: of all, or a tree of placements.
    """

    def place(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(placement, jax.sharding.Sharding):
        return jax.tree.map(lambda array: place(array, placement), tree)
    return jax.tree.map(place, tree, placement)


@dataclasses.dataclass(frozen=True)
class Share:
    """What this process has of a batch whose rows are shared out over a mesh.

    Where `tensor` goes across processes, several of them have the same rows; the first of them counts those.
    """

    mesh: Mesh

    def own(self, count: int) -> np.ndarray:
        """The rows of a batch of `count` that this process's devices hold, ascending."""
        return np.flatnonzero(self._held(count)[jax.process_index()])

    def counted(self, count: int) -> np.ndarray:
        """Which of the `own` rows [rows, 1] no process of a lower number holds too."""
        held, me = self._held(count), jax.process_index()
        elsewhere = np.logical_or.reduce(held[:me], axis=0)
        return ~elsewhere[self.own(count), None]

    def of_step(self, micro_batches: int, micro_batch_size: int) -> np.ndarray:
        """The rows of a step's batch that this process has: of the first micro-batch, of the second, ..."""
        starts = micro_batch_size * np.arange(micro_batches)
        return (starts[:, None] + self.own(micro_batch_size)).reshape(-1)

    def put(self, batch: Mapping[str, np.ndarray], micro_batches: int | None = None) -> dict[str, jax.Array]:
        """Places this process's part of a batch.

        Args:
            batch: arrays of its `own` rows, or, with micro-batches, of those `of_step`: [rows, T].
            micro_batches: M, None for a batch that is not cut into them.
        Returns:
            The arrays of all processes: [B, T], or [M, B, T].
        """
        shares = row_devices(self.mesh)
        held = len(next(iter(batch.values()))) // (micro_batches or 1)
        count = held * shares // len(self.own(shares))
        own = self.own(count)
        cut = () if micro_batches is None else (micro_batches,)
        placement = batch_sharding(self.mesh, micro_batches is not None)

        def place(local: np.ndarray) -> jax.Array:
            local = local.reshape(*cut, len(own), *local.shape[1:])

            def part(index: Any) -> np.ndarray:
                start, stop, _ = index[len(cut)].indices(count)
                at = int(np.searchsorted(own, start))
                return local[(*index[: len(cut)], slice(at, at + stop - start))]

            return jax.make_array_from_callback((*cut, count, *local.shape[len(cut) + 1 :]), placement, part)

        return {name: place(np.asarray(x)) for name, x in batch.items()}

    def fetch(self, found: Any, count: int) -> Any:
        """The `own` rows, on the host, of a tree of arrays [count, ...] that are placed as batches are."""
        if exchange.alone():
            return jax.device_get(found)
        own = self.own(count)

        def rows(array: jax.Array) -> np.ndarray:
            host = np.empty((len(own), *array.shape[1:]), array.dtype)
            for shard in array.addressable_shards:
                start, stop, _ = shard.index[0].indices(count)
                at = int(np.searchsorted(own, start))
                host[at : at + stop - start] = shard.data
            return host

        return jax.tree.map(rows, found)

    def _held(self, count: int) -> np.ndarray:
        """bool [processes, count]: which process's devices hold which row."""
        held = np.zeros((jax.process_count(), count), bool)
        for device, (rows,) in batch_sharding(self.mesh, False).devices_indices_map((count,)).items():
            held[device.process_index, rows] = True
        return held
