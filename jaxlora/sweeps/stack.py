"""Adapters side by side on the devices: one state with a leading axis of trials, one program, one base.

Adapters of lower rank are filled up with zeros, which is exact: a zero column of a meets a zero row of b, so the
gradient of each is zero, and so are Adam's moments and what weight decay takes off.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlora.parallel import sharding
from jaxlora.parallel.mesh import TRIALS
from jaxlora.parallel.rows import placed
from jaxlora.training.loop import Made
from jaxlora.training.state import TrainState

Ranks = Mapping[str, int]
"""The rank of each target, by its name."""

_RANK_AXIS = {"a": -1, "b": -2}  # of [..., in, R] and [..., R, out]


def largest(ranks: Sequence[Ranks]) -> dict[str, int]:
    """The largest rank of each target, of adapters that have the same targets."""
    return {name: max(each[name] for each in ranks) for name in ranks[0]}


def with_ranks(state: TrainState, ranks: Ranks) -> TrainState:
    """The state with its pairs, and all that is shaped like them, cut to these ranks or filled up with zeros."""

    def resized(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if len(names) < 2 or names[-1] not in _RANK_AXIS:
            return leaf
        axis, rank = leaf.ndim + _RANK_AXIS[names[-1]], ranks[names[-2]]
        more = rank - leaf.shape[axis]
        if more <= 0:
            return jax.lax.slice_in_dim(leaf, 0, rank, axis=axis)
        return jnp.pad(leaf, [(0, more if i == axis else 0) for i in range(leaf.ndim)])

    return jax.tree_util.tree_map_with_path(resized, state)


def placed_shapes(mesh: Mesh, state: TrainState, ranks: Ranks) -> TrainState:
    """The placed shapes of a state with these ranks."""
    shapes = jax.eval_shape(partial(with_ranks, ranks=ranks), state)
    return jax.tree.map(
        lambda x, placement: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement),
        shapes,
        sharding.state_shardings(mesh, shapes),
    )


def stacked_shapes(mesh: Mesh, state: TrainState, count: int) -> TrainState:
    """The placed shapes of `count` states like this one on a leading axis of trials."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (count, *x.shape), x.dtype, sharding=sharding.of_trials(mesh, x.sharding.spec)
        ),
        state,
    )


def slots(mesh: Mesh, trials: int) -> int:
    """How long the axis of trials is for so many: a multiple of mesh.trial."""
    parts = sharding.trial_devices(mesh)
    return -(-trials // parts) * parts


def side_by_side(
    step: Callable[..., tuple[TrainState, Any]], own_batches: bool, mesh: Mesh
) -> Callable[..., tuple[TrainState, Any]]:
    """`step(states, base, batch, active) -> (states, sums)` of `step(state, base, batch) -> (state, sums)`.

    A trial that is not `active` (bool [A]) stays as it is, whatever it holds: trials that wait, and those that ended.
    The base has no axis of trials, so that each of its products is one product over the rows of all.

    Args:
        own_batches: whether each trial has a batch of its own.
    """

    def one(state: TrainState, base: Any, batch: Any, active: jax.Array) -> tuple[TrainState, Any]:
        after, sums = step(state, base, batch)
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), after, state), sums

    return jax.vmap(
        one,
        in_axes=(0, None, 0 if own_batches else None, 0),
        spmd_axis_name=TRIALS if sharding.trial_devices(mesh) > 1 else None,
    )


class Stack:
    """The states of trials on the devices.

    Args:
        mesh: where they live.
        like: the placed shapes of one state, filled up to the ranks of the largest.
        names: of the trials, a slot each, in order; those that nothing is put for hold zeros.
    Attributes:
        names: of the slots.
    """

    def __init__(self, mesh: Mesh, like: TrainState, names: Sequence[str]):
        self._mesh, self._like = mesh, like
        self._ranks = ranks_of(like)
        self._jitted: dict[Any, Callable[..., Any]] = {}
        self.names = tuple(names)
        shapes = stacked_shapes(mesh, like, slots(mesh, len(names)))
        self._states: TrainState = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            out_shardings=_placements(shapes),
        )()

    @property
    def slots(self) -> int:
        """How many there are: those of `names`, and empty ones after them where devices come in groups."""
        return slots(self._mesh, len(self.names))

    def step(
        self, program: Callable[..., Any], base: Any, batch: Any, active: Sequence[str]
    ) -> dict[str, Made]:
        """Makes one step of these trials; returns what came of it, by trial, without waiting for it.

        Args:
            program: of `side_by_side`, compiled for so many slots; the states are donated.
        """
        moving = np.zeros(self.slots, bool)
        moving[[self.names.index(name) for name in active]] = True
        everywhere = sharding.of_trials(self._mesh, PartitionSpec())
        self._states, sums = program(self._states, base, batch, placed(moving, everywhere))
        fetched = _Fetched(sums)
        return {name: fetched.of(self.names.index(name)) for name in active}

    def take(self, name: str, ranks: Ranks) -> TrainState:
        """A copy of a trial's state, with the ranks that it has alone."""

        def cut(states: TrainState, slot: jax.Array) -> TrainState:
            return with_ranks(jax.tree.map(lambda x: x[slot], states), ranks)

        key = ("take", len(self.names), *sorted(ranks.items()))
        if key not in self._jitted:
            placements = _placements(placed_shapes(self._mesh, self._like, ranks))
            self._jitted[key] = jax.jit(cut, out_shardings=placements)
        return self._jitted[key](self._states, self._slot(name))

    def put(self, name: str, state: TrainState) -> None:
        """Puts a state, of whatever ranks, in a trial's place."""

        def fill(states: TrainState, slot: jax.Array, state: TrainState) -> TrainState:
            return jax.tree.map(lambda x, new: x.at[slot].set(new), states, with_ranks(state, self._ranks))

        key = ("put", len(self.names))
        if key not in self._jitted:
            placements = _placements(stacked_shapes(self._mesh, self._like, self.slots))
            self._jitted[key] = jax.jit(fill, out_shardings=placements, donate_argnums=0)
        self._states = self._jitted[key](self._states, self._slot(name), state)

    def shrink(self, names: Sequence[str]) -> None:
        """Goes on with these trials alone, in this order."""
        count = slots(self._mesh, len(names))
        chosen = [self.names.index(name) for name in names]
        chosen += [chosen[0]] * (count - len(chosen))
        placements = _placements(stacked_shapes(self._mesh, self._like, count))
        pick = jax.jit(
            lambda states, index: jax.tree.map(lambda x: x[index], states), out_shardings=placements
        )
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._states = pick(self._states, placed(np.asarray(chosen, np.int32), everywhere))
        self.names = tuple(names)

    def _slot(self, name: str) -> jax.Array:
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        return placed(np.int32(self.names.index(name)), everywhere)


class _Fetched:
    """The sums of a step, brought to the host once for all trials, when the first of them asks."""

    def __init__(self, sums: Any):
        self._sums = sums
        self._host: dict[str, Any] = {}

    def of(self, slot: int) -> Made:
        """What a trial is told of the step."""
        return Made(lambda: self._numbers(slot), _RowsOf(self._sums.rows_nll, slot))

    def _numbers(self, slot: int) -> dict[str, float]:
        if not self._host:
            scalars = {name: value for name, value in self._sums._asdict().items() if name != "rows_nll"}
            self._host = jax.device_get(scalars)
        return {name: float(value[slot]) for name, value in self._host.items()}


class _RowsOf:
    """A trial's part of an array [A, ...] that stays on the device until it is read."""

    def __init__(self, array: jax.Array, slot: int):
        self._array, self._slot = array, slot

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(np.asarray(self._array)[self._slot], dtype)


def _placements(shapes: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, shapes)


def ranks_of(state: TrainState) -> dict[str, int]:
    """The ranks of a state's targets."""
    found: dict[str, int] = {}

    def look(path: tuple[Any, ...], leaf: Any) -> None:
        if path[-1].key == "b":
            found[path[-2].key] = leaf.shape[-2]

    jax.tree_util.tree_map_with_path(look, state.adapter)
    return found
