"""TPUs that are not there: libtpu describes them, and compiles for them, on any machine."""

import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from jaxlora.core.errors import InputError

KNOWN = {
    # the name before the colon: (axes, options for libtpu, an example)
    "v4": (3, {"chip_config_name": "megacore"}, "v4:2x2x1"),  # the two cores of a chip as one device
    "v5e": (2, {}, "v5e:2x4"),
    "v5p": (3, {}, "v5p:2x2x1"),
    "v6e": (2, {}, "v6e:2x4"),
}
LARGEST = 9216
"""Chips; libtpu would describe millions, in minutes."""


def parse(topology: str) -> tuple[str, tuple[int, ...]]:
    """A topology's kind of chip and its chips along each axis; touches neither JAX nor libtpu.

    Raises:
        InputError: it is none; lists those that there are.
    """
    examples = ", ".join(example for _, _, example in KNOWN.values())
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if match is None or match[1] not in KNOWN:
        raise InputError(
            f"--topology {topology}: there is no such topology. Known are {', '.join(KNOWN)}, with the chips "
            f"along each axis: {examples}."
        )
    sizes, axes = tuple(map(int, match[2].split("x"))), KNOWN[match[1]][0]
    if len(sizes) != axes or not 0 < math.prod(sizes) <= LARGEST:
        raise InputError(
            f"--topology {topology}: a {match[1]} has {axes} axes and at most {LARGEST:,} chips; give, for example, "
            f"{KNOWN[match[1]][2]}."
        )
    return match[1], sizes


def prepare_environment() -> None:
    """Sets what has to be set before JAX is imported: nobody asks for a TPU, and no TPU is taken.

    Raises:
        InputError: there is no libtpu.
    """
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        wanted = next(
            (
                need.split(";")[0].strip()
                for need in importlib.metadata.requires("jax") or ()
                if "libtpu" in need
            ),
            "libtpu",
        )
        raise InputError(
            "--topology needs libtpu, the compiler for TPUs, which is not installed (no TPU is needed).\n"
            f'Get it with pip install "jax[tpu]", or pip install "{wanted}" for the compiler alone.'
        )
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server is looked for
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a lock file is for those who use the chips
        "JAX_PLATFORMS": "cpu",
    }
    # What a TPU VM would say of itself; libtpu complains where nobody says it, though nothing here depends on it.
    for name, value in {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")


def devices(topology: str) -> Sequence[Any]:
    """The devices of a topology, to be compiled for: one a chip. `prepare_environment` came before.

    Raises:
        InputError: `parse`'s, or libtpu does not know this one.
    """
    import jax
    from jax.experimental import topologies

    kind, sizes = parse(topology)
    options: dict[str, Any] = dict(KNOWN[kind][1])
    if any(size % 2 for size in sizes[:2]):
        options["chips_per_host_bounds"] = [1, 1, 1]  # else a host has 2 x 2
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--topology {topology}: libtpu does not take it ({reason}); give, for example, {KNOWN[kind][2]}."
        ) from error
