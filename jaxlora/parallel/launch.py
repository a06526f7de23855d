"""How a command was started: alone, or as one of several processes, and what says so.

Touches neither JAX nor the network.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from typing import NamedTuple

from jaxlora.core.errors import InputError

LOST_AFTER = 60.0
"""Seconds without a sign of life after which a process counts as dead."""


class Launch(NamedTuple):
    """This process among several.

    Attributes:
        address: HOST:PORT of process 0; None where JAX finds it by itself (Slurm, Open MPI).
        count, index: processes in all, and this one's number from 0; as far as known.
        lost_after: seconds, see `LOST_AFTER`.
    """

    address: str | None
    count: int
    index: int
    lost_after: float = LOST_AFTER

    @property
    def port(self) -> int:
        """Of process 0; 0 for any."""
        return int((self.address or ":0").rpartition(":")[2])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives a command --coordinator, --processes, --process and --lost-after."""
    group = parser.add_argument_group(
        "several processes", "needed neither on a TPU pod nor under Slurm or Open MPI; see docs/processes.md"
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0 (JAX_COORDINATOR_ADDRESS)"
    )
    group.add_argument("--processes", metavar="N", help="how many there are (JAX_NUM_PROCESSES)")
    group.add_argument("--process", metavar="I", help="which one this is, from 0 (JAX_PROCESS_ID)")
    group.add_argument(
        "--lost-after",
        type=float,
        default=LOST_AFTER,
        metavar="SECONDS",
        help="without a sign of life until a process counts as dead, and the others stop (%(default)g)",
    )


def of(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Launch | None:
    """The launch that flags, or else the environment, describe; None where nobody says that there are several.

    Raises:
        InputError: a number that is none, or numbers that do not go together.
    """
    address = arguments.coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    if not 5 <= arguments.lost_after <= 3600:
        raise InputError(f"--lost-after is {arguments.lost_after:g}; give 5 to 3600 seconds.")
    if address:
        return _named(arguments, environment, address)._replace(lost_after=arguments.lost_after)
    if arguments.processes is not None or arguments.process is not None:
        raise InputError(
            "--processes and --process go with --coordinator HOST:PORT; give all three, or none."
        )
    for size, rank, needed in (
        ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),  # the last is there under srun alone
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ):
        if needed in environment and environment.get(size, "1") != "1":
            count, index = (_number(environment.get(name, "0"), name) for name in (size, rank))
            return Launch(None, count, index, arguments.lost_after)
    return None


def from_environment(environment: Mapping[str, str]) -> Launch | None:
    """`of`, for a command without the flags."""
    nothing = argparse.Namespace(coordinator=None, processes=None, process=None, lost_after=LOST_AFTER)
    return of(nothing, environment)


def keep_stdout(launch: Launch | None) -> None:
    """Leaves standard output to process 0, and to what it prints itself: before anything is printed.

    Libraries write there in C++ (gloo, a line for each connection), and a result may be read from it.
    """
    if launch is None or launch.count == 1:
        return
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    ours = os.dup(1) if launch.index == 0 else os.dup(nowhere)
    os.dup2(nowhere, 1)
    sys.stdout = os.fdopen(ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def typed(arguments: argparse.Namespace) -> list[str]:
    """The flags of `add_arguments` that were given, to be typed again."""
    names = ("coordinator", "processes", "process")
    given = [(name, getattr(arguments, name)) for name in names if getattr(arguments, name) is not None]
    if arguments.lost_after != LOST_AFTER:
        given.append(("lost-after", f"{arguments.lost_after:g}"))
    return [word for name, value in given for word in (f"--{name}", str(value))]


def _named(arguments: argparse.Namespace, environment: Mapping[str, str], address: str) -> Launch:
    named = "--coordinator" if arguments.coordinator else "JAX_COORDINATOR_ADDRESS"
    _number(address.rpartition(":")[2], f"the port of {named}")
    numbers = []
    for flag, name, default in (("processes", "JAX_NUM_PROCESSES", "1"), ("process", "JAX_PROCESS_ID", "0")):
        given = getattr(arguments, flag)
        value = environment.get(name, default) if given is None else given
        numbers.append(_number(value, name if given is None else f"--{flag}"))
    count, index = numbers
    if not 0 <= index < count:
        raise InputError(
            f"process {index} of {count}: give --processes N (JAX_NUM_PROCESSES) and --process 0 to N - 1 "
            "(JAX_PROCESS_ID)."
        )
    return Launch(address, count, index)


def _number(value: str, name: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise InputError(
            f"{name} is {value!r}, which is no number; give "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES=N and JAX_PROCESS_ID=0 to N - 1 (or --coordinator, "
            "--processes and --process), or none of them."
        ) from None
