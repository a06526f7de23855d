"""What processes that train together tell each other beside the devices: small values, by JAX's coordination service.

Every function here is called by all processes, in the same order, from their main threads; whoever is first waits for
the others. Where a process is alone they cost nothing. A process that dies meanwhile is noticed by `watch`, not here.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxlora.core.errors import InputError

_TURN = 30_000  # milliseconds that one request waits for a value before it asks anew
_numbers = itertools.count()


def client() -> Any:
    """JAX's client of the coordination service; None without jax.distributed.

    Not public, and the same in jax 0.6 to 0.10 at least; Orbax relies on it, too.
    """
    from jax._src import distributed

    return distributed.global_state.client


def index() -> int:
    """The number of this process, from 0; touches no device."""
    from jax._src import distributed

    return distributed.global_state.process_id


def count() -> int:
    """How many processes there are; touches no device."""
    from jax._src import distributed

    return distributed.global_state.num_processes


def alone() -> bool:
    """Whether there is no other process."""
    return count() == 1


def first() -> bool:
    """Whether this is process 0, which alone writes and speaks."""
    return index() == 0


def from_first(make: Callable[[], Any]) -> Any:
    """What process 0 makes, for all: a JSON value. The others wait, for as long as it takes.

    Raises:
        InputError: in all processes, where process 0 raises one.
        RuntimeError: in the others, where it raises something else.
    """
    if alone():
        return make()
    key = f"jaxlora/from_first/{next(_numbers)}"
    if first():
        try:
            made = {"value": make()}
        except Exception as error:
            kind = "refused" if isinstance(error, InputError) else "failed"
            client().key_value_set(key, json.dumps({kind: str(error)}))
            raise
        client().key_value_set(key, json.dumps(made))
    told = json.loads(_get(key))  # by process 0 too, which then has what the others have: lists for tuples
    if "refused" in told:
        raise InputError(told["refused"])
    if "failed" in told:
        raise RuntimeError(f"in process 0: {told['failed']}")
    return told["value"]


def gathered(value: Any) -> list[Any]:
    """The JSON value of every process, by their numbers."""
    if alone():
        return [value]
    key = f"jaxlora/gathered/{next(_numbers)}"
    client().key_value_set(f"{key}/{index()}", json.dumps(value))
    return from_first(lambda: [json.loads(_get(f"{key}/{i}")) for i in range(count())])


def agreed(what: str, values: dict[str, Any]) -> None:
    """Refuses to go on where processes differ in what must be the same.

    Args:
        what: of these values, for a person: "config".
        values: by name.
    Raises:
        InputError: in all processes; names the first differences.
    """

    def check(found: list[dict[str, Any]]) -> None:
        for number, other in enumerate(found):
            names = [n for n in dict.fromkeys((*found[0], *other)) if found[0].get(n) != other.get(n)]
            if names:
                told = "; ".join(
                    f"{n} is {_told(other.get(n))} there and {_told(found[0].get(n))} in process 0"
                    for n in names[:3]
                )
                more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
                raise InputError(
                    f"process {number} of {len(found)} has another {what}: {told}{more}.\nStart all processes with the "
                    "same command, code and data."
                )

    if not alone():
        found = gathered(values)
        from_first(lambda: check(found))


def _told(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def summed(array: np.ndarray) -> np.ndarray:
    """The sum of every process's float64 array, taken in the order of the processes: the same bits in all of them.

    Travels over the devices' own connections, as words: JAX would round to float32.
    """
    if alone():
        return array
    from jax.experimental import multihost_utils

    words = np.ascontiguousarray(array, np.float64).reshape(-1).view(np.uint32)
    found = np.asarray(multihost_utils.process_allgather(words)).reshape(count(), -1)
    total = np.zeros(array.size)
    for part in found:
        total += np.ascontiguousarray(part, np.uint32).view(np.float64)
    return total.reshape(array.shape)


def whole(tree: Any) -> Any:
    """A tree's arrays on the host, whole, in every process; one leaf after another, however they are cut."""

    def fetch(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(fetch, tree)


def _get(key: str) -> str:
    while True:
        try:
            return client().blocking_key_value_get(key, _TURN)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
