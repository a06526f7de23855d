"""What a compiled program sends between devices, read from its HLO.

XLA's own cost analysis knows nothing of it, so the text is read: a computation is run as often as the loops around it
turn, and each collective in it moves the bytes that its ring algorithm does.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from jaxlora.parallel.hlo import ARRAY, INSTRUCTION, bytes_of, computations, runs, shape_of

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_STARTS = re.compile(r" custom-call\(%?([\w.-]+)\).*AsyncCollectiveStart")


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
        kind: one of `KINDS`.
        shapes: of the arrays that it hands out on each device.
        result: their bytes.
        moved: bytes that a device receives each time, of the ring algorithm: (n - 1) / n of what is gathered or
            exchanged in a group of n devices, twice that for an all-reduce, all of it for a permutation.
        times: how often it runs when the program runs once.
        loops: how many loops are around it.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    result: int
    moved: float
    times: int
    loops: int


def collectives(hlo: str) -> list[Collective]:
    """All collectives of a compiled program, `compiled.as_text()`.

    A TPU's compiler hides a collective behind other work by writing it into each of a chain of fusions, also into
    those of a loop; it counts where it starts.
    """
    entry, bodies = computations(hlo)
    found = []
    for name, (times, loops) in runs(entry, bodies).items():
        starts = {match[1] for line in bodies[name] if (match := _STARTS.search(line))}
        for line in bodies[name]:
            match, instruction = _COLLECTIVE.search(line), INSTRUCTION.match(line)
            chained = "chain_id=" in line and instruction is not None and instruction[1] not in starts
            if match and not chained:
                found.append(_collective(line, match, times, loops))
    return found


def totals(of: Iterable[Collective]) -> dict[str, float]:
    """Bytes that a device receives in a run of the program, by kind, most first."""
    sums: dict[str, float] = defaultdict(float)
    for one in of:
        sums[one.kind] += one.moved * one.times
    return dict(sorted(sums.items(), key=lambda pair: -pair[1]))


def _collective(line: str, match: re.Match[str], times: int, loops: int) -> Collective:
    kind, started = match[1], match[2] is not None
    arrays = [(name, shape_of(sizes)) for name, sizes in ARRAY.findall(line[: match.start()])]
    if started and kind == "collective-permute":
        arrays = arrays[1:2]  # (operand, result, two semaphores)
    elif started and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # (operands, results)
    result = sum(bytes_of(name, sizes) for name, sizes in arrays)
    n = _group_size(line)
    share = (n - 1) / n
    moved = {
        "all-reduce": 2 * share * result,
        "reduce-scatter": share * result * n,
        "collective-permute": result,
        "collective-broadcast": result,
    }.get(kind, share * result)
    return Collective(kind, tuple(sizes for _, sizes in arrays), result, moved, times, loops)


def _group_size(line: str) -> int:
    """Devices in a group, in each of the forms in which XLA writes replica_groups."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in parts)
    return 2  # all devices, however many: no less than this
