"""How much memory a program may take of each device."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlora.core.errors import InputError
from jaxlora.parallel import chips, exchange


class Capacity(NamedTuple):
    """What a run may take of each device.

    Attributes:
        size: bytes.
        source: where the number is from, for a person.
    """

    size: int
    source: str

    def holds(self, need: int | None) -> bool:
        """Whether so many bytes fit; None (the compiler found no way to place them) does not."""
        return need is not None and need <= self.size


def capacity(memory_gb: float, devices: Iterable[Any]) -> Capacity:
    """The memory of each device of a run.

    Args:
        memory_gb: mesh.memory_gb; 0 asks the device, or, where it has no memory of its own (a CPU), the machine, whose
            memory its devices share.
        devices: of the run; they may be described only (`parallel.topology`), then a table knows their memory.
    Raises:
        InputError: the table does not.
    """
    if memory_gb:
        return Capacity(round(memory_gb * 1e9), "mesh.memory_gb")
    devices = list(devices)
    if described(devices[0]):
        chip = chips.find(devices[0].device_kind)
        if chip is None:
            raise InputError(
                f"nothing is known of the memory of a {devices[0].device_kind}; say it with --config.mesh.memory_gb."
            )
        return Capacity(chip.memory, f"what programs may take of a {chip.name}")
    local = [device for device in devices if device.process_index == jax.process_index()]
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in local]
    known = [limit for limit in limits if limit]
    shared = f", shared by {len(local)} devices" if len(local) > 1 else ""
    own = (
        (min(known), "the device's own")
        if known
        else (machine_memory() // len(local), f"the machine's{shared}")
    )
    return Capacity(*min(exchange.gathered(own)))  # of all processes: they have to agree on what fits


def described(device: Any) -> bool:
    """Whether a device is only described, to be compiled for: nothing can be placed on it."""
    return type(getattr(device, "client", None)).__name__ == "CompileOnlyPyClient"


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may take: the machine's memory, or less where a control group says so.

    Args:
        root: where proc/ and sys/ are.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:  # not Linux
        groups = []
    for _, controllers, path in groups:
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, file = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        mounted = root / "sys/fs/cgroup" / folder
        group = mounted / path.strip("/")
        for level in (
            group,
            *group.parents,
        ):  # a limit holds for all below; in a container the lower ones are hidden
            with contextlib.suppress(OSError, ValueError):  # hidden, or "max"
                found.append(int((level / file).read_text()))
            if level == mounted:
                break
    return min(found)


def told(size: int) -> str:
    """ "12.34 GB", "98.10 MB", "7.00 kB"."""
    unit, name = next(
        pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= pair[0] or pair[0] == 1e3
    )
    return f"{size / unit:,.2f} {name}"
