"""What there is of a device's memory: what a person says, what the device says, or a share of the machine's."""

import types
from typing import Any

import jax
import pytest

from jaxlora.parallel.capacity import Capacity, capacity, machine_memory, told


def that_say(*limits: int | None) -> list[Any]:
    """Devices that say this of themselves."""
    return [
        types.SimpleNamespace(process_index=0, memory_stats=lambda n=n: n and {"bytes_limit": n})
        for n in limits
    ]


def test_where_the_number_is_from():
    four = jax.devices()[:4]
    assert capacity(1.5, four) == (1_500_000_000, "mesh.memory_gb")
    assert capacity(0, four) == (machine_memory() // 4, "the machine's, shared by 4 devices")
    assert capacity(0, that_say(800, 700)) == (700, "the device's own")
    assert capacity(0, that_say(None)) == (machine_memory(), "the machine's")
    assert capacity(2, that_say(700)).size == 2_000_000_000


def test_what_fits():
    assert Capacity(10, "").holds(10)
    assert not Capacity(10, "").holds(11)
    assert not Capacity(10, "").holds(None)
    assert [told(size) for size in (12_345_678_901, 999_600_000, 1_000, 10)] == [
        "12.35 GB", "999.60 MB", "1.00 kB", "0.01 kB",
    ]  # fmt: skip


GROUPS = {
    "none": ({}, None),
    "version 2, two levels": (
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n",
         "sys/fs/cgroup/a/memory.max": "7000\n"},
        7000,
    ),
    "version 2, hidden": (
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/memory.max": "6000\n"},
        6000,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/a\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "5000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**62}\n",
            "sys/fs/cgroup/cpu,cpuacct/x/memory.limit_in_bytes": "1\n",
        },
        5000,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_a_control_group_may_give_less_than_the_machine(name, tmp_path):
    files, limit = GROUPS[name]
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    machine = machine_memory(tmp_path / "nowhere")
    assert machine > 2**28
    assert machine_memory(tmp_path) == (limit or machine)
