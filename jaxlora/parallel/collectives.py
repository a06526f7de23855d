"""What a compiled program sends between devices, read from its HLO.

XLA's own cost analysis knows nothing of it, so the text is read: a computation is run as often as the loops around it
turn, and each collective in it moves the bytes that its ring algorithm does.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
# Not two of them: so ends a kernel's own text, which a custom call may quote over several lines.
_END = re.compile(r"^\}(?!\})")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_CONSTANT = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")
_ELEMENT = re.compile(r"= [su]\d+\[\]\S* get-tuple-element\(.*index=(\d+)")
_BODY = re.compile(r"\bbody=%?([\w.-]+)")
_STARTS = re.compile(r" custom-call\(%?([\w.-]+)\).*AsyncCollectiveStart")
_NO_TRIPS = 1  # of a loop whose end depends on data


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
    entry, bodies = _computations(hlo)
    found = []
    for name, (times, loops) in _runs(entry, bodies).items():
        starts = {match[1] for line in bodies[name] if (match := _STARTS.search(line))}
        for line in bodies[name]:
            match, instruction = _COLLECTIVE.search(line), _INSTRUCTION.match(line)
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


def _computations(hlo: str) -> tuple[str, dict[str, list[str]]]:
    """The entry's name, and the instructions of each computation."""
    entry, name, bodies = "", None, {}
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif _END.match(line):
            name = None
        elif name is not None and _INSTRUCTION.match(line):
            bodies[name].append(line)
    return entry, bodies


def _runs(entry: str, bodies: Mapping[str, list[str]]) -> dict[str, tuple[int, int]]:
    """(how often it runs, loops around it) of each computation; of all its callers together, the innermost."""
    callers: dict[str, list[tuple[str, int]]] = defaultdict(list)  # (caller, times for each of its runs)
    for caller, lines in bodies.items():
        for line in lines:
            condition = _CONDITION.search(line)
            times = _trip_count(line, condition[1], bodies) if condition else 0
            for called in _CALLED.finditer(line):
                for name in re.findall(r"[\w.-]+", called[1] or called[2]):
                    if name in bodies:
                        callers[name].append((caller, times))
    known = {entry: (1, 0)}

    def runs(name: str) -> tuple[int, int]:
        if name not in known:
            around = [(runs(caller), times) for caller, times in callers[name]]
            known[name] = (
                sum(count * (times or 1) for (count, _), times in around),
                max((depth + bool(times) for (_, depth), times in around), default=0),
            )
        return known[name]

    return {name: runs(name) for name in bodies}


def _trip_count(line: str, condition: str, bodies: Mapping[str, list[str]]) -> int:
    """How often a loop turns: what the compiler knows, else the constant that its condition compares with."""
    if known := _TRIPS.search(line):
        return int(known[1])
    lines, seen = list(bodies.get(condition, ())), {condition}
    for inner in lines:  # grows: a fused comparison has its constant here or there
        for called in _CALLED.finditer(inner):
            for name in re.findall(r"[\w.-]+", called[1] or called[2]):
                if name not in seen:
                    seen.add(name)
                    lines.extend(bodies.get(name, ()))
    constants = {int(match[1]) for inner in lines if (match := _CONSTANT.search(inner))}
    if len(constants) != 1:
        return _NO_TRIPS
    return math.ceil(constants.pop() / _stride(line, condition, bodies))


def _stride(line: str, condition: str, bodies: Mapping[str, list[str]]) -> int:
    """By how much a loop's counter grows in a turn: 2 where the compiler wrote two turns into one, as TPUs' do."""
    index = next((int(m[1]) for inner in bodies.get(condition, ()) if (m := _ELEMENT.search(inner))), None)
    body = bodies.get(match[1], []) if (match := _BODY.search(line)) else []
    root = next((inner for inner in body if inner.lstrip().startswith("ROOT") and " tuple(" in inner), "")
    handed_on = re.findall(r"%([\w.-]+)", root.partition(" tuple(")[2].partition(")")[0])
    if index is None or index >= len(handed_on):
        return 1
    by_name = {match[1]: match[2] for inner in body if (match := _INSTRUCTION.match(inner))}
    grown = re.search(r" add\(([^)]*)\)", by_name.get(handed_on[index], ""))
    for name in re.findall(r"%([\w.-]+)", grown[1]) if grown else ():
        if step := _CONSTANT.search(f"= {by_name.get(name, '')}"):
            return max(1, int(step[1]))
    return 1


def _collective(line: str, match: re.Match[str], times: int, loops: int) -> Collective:
    kind, started = match[1], match[2] is not None
    arrays = [(name, _sizes(sizes)) for name, sizes in _ARRAY.findall(line[: match.start()])]
    if started and kind == "collective-permute":
        arrays = arrays[1:2]  # (operand, result, two semaphores)
    elif started and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # (operands, results)
    result = sum(_bytes(name, sizes) for name, sizes in arrays)
    n = _group_size(line)
    share = (n - 1) / n
    moved = {
        "all-reduce": 2 * share * result,
        "reduce-scatter": share * result * n,
        "collective-permute": result,
        "collective-broadcast": result,
    }.get(kind, share * result)
    return Collective(kind, tuple(sizes for _, sizes in arrays), result, moved, times, loops)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


def _bytes(name: str, sizes: tuple[int, ...]) -> int:
    bits = 8 if name == "pred" else int(re.findall(r"\d+", name)[0])
    return math.ceil(math.prod(sizes) * bits / 8)


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
