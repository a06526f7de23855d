"""Bytes that a compiled program's instructions read and write: what the memory has to move, were nothing in a cache.

XLA's own count takes the body of a loop once, however often it turns, so the program's text is read.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxlora.parallel.hlo import ARRAY, INSTRUCTION, bytes_of, computations, runs, shape_of

_OPERATION = re.compile(r"(?:^|[\s)}\]])([a-z][\w-]*)\(")
_INNER = re.compile(r"\b(?:calls|to_apply)=%?([\w.-]+)")
# Instructions that name bytes without moving them; what a loop or a call does is counted inside it.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "iota",
}
_SLICES = {"dynamic-slice", "slice", "gather"}
# Of so many elements of these, as many of what they are given are needed.
_ALIKE = {"convert", "bitcast", "copy", "reshape", "transpose", "reverse"}


class _Instruction(NamedTuple):
    """`size`: bytes of all that it hands out. `inner`: the fused computation. `number`: a parameter's."""

    name: str
    kind: str
    size: int
    elements: int
    operands: list[str]
    inner: str
    root: bool
    number: int


def moved(text: str) -> dict[str, float]:
    """Bytes read and written in one run of a program, those of a loop as often as it turns; most first.

    An instruction is counted with all that it hands out and is given; of what is only sliced, or of a large array that
    is changed in its place, with the part. Of a conditional all branches are counted.

    Args:
        text: `compiled.as_text()`.
    Returns:
        By the instructions' names without their numbers, which say what was fused: "add_convert_fusion".
    """
    entry, lines = computations(text)
    bodies = {name: [found for line in body if (found := _read(line))] for name, body in lines.items()}
    fused = {one.inner for body in bodies.values() for one in body if one.inner and one.kind != "call"}
    sums: dict[str, float] = defaultdict(float)
    for name, (times, _) in runs(entry, lines).items():
        given = {one.name: one for one in bodies[name]}
        for one in bodies[name] if name not in fused else ():
            sums[re.sub(r"[.\d]+$", "", one.name)] += times * _of(one, given, bodies)
    return dict(sorted(sums.items(), key=lambda pair: -pair[1]))


def _read(line: str) -> _Instruction | None:
    match = INSTRUCTION.match(line)
    operation = _OPERATION.search(match[2]) if match else None
    if match is None or operation is None:
        return None
    arrays = [(dtype, shape_of(shape)) for dtype, shape in ARRAY.findall(match[2][: operation.start(1)])]
    inner, given = _INNER.search(match[2]), match[2][operation.end() :].partition(")")[0]
    return _Instruction(
        name=match[1],
        kind=operation[1],
        size=sum(bytes_of(*array) for array in arrays),
        elements=sum(math.prod(shape) for _, shape in arrays),
        operands=re.findall(r"%([\w.-]+)", given),
        inner=inner[1] if inner else "",
        root=line.lstrip().startswith("ROOT"),
        number=int(given) if operation[1] == "parameter" else -1,
    )


def _of(
    one: _Instruction, given: Mapping[str, _Instruction], bodies: Mapping[str, Sequence[_Instruction]]
) -> float:
    """Bytes of one instruction; `given` are those of its computation."""
    if one.kind in _FREE or one.kind.endswith("-done"):
        return 0.0
    sizes = [given[name].size if name in given else 0 for name in one.operands]
    if one.kind == "fusion" and one.inner in bodies:
        return _fusion(one, sizes, bodies[one.inner])
    if one.kind == "dynamic-update-slice":
        return 2.0 * sizes[1] + sum(sizes[2:])
    if one.kind in _SLICES:
        return 2.0 * one.size + sum(sizes[1:])
    return one.size + float(sum(sizes))


def _fusion(one: _Instruction, sizes: Sequence[int], body: Sequence[_Instruction]) -> float:
    """What its computation needs of each parameter, by going back from what it hands out."""
    by_name = {inner.name: inner for inner in body}
    root = next(inner for inner in body if inner.root)
    last = root
    while last.kind == "bitcast" and last.operands[0] in by_name:
        last = by_name[last.operands[0]]
    in_place = last.kind == "dynamic-update-slice"
    written = by_name[last.operands[1]].size if in_place else one.size
    needed = dict.fromkeys(by_name, 0.0)  # elements
    needed[root.name] = root.elements
    for inner in reversed(body):  # what is used stands before its user
        wanted = needed[inner.name]
        if not wanted or inner.kind in ("parameter", "constant"):
            continue
        for place, name in enumerate(inner.operands):
            if name not in by_name:
                continue
            whole = by_name[name].elements
            if inner.kind == "dynamic-update-slice" and in_place and inner is last:
                part = 0.0 if place == 0 else whole
            elif (inner.kind in _SLICES and place == 0) or inner.kind in _ALIKE or whole == inner.elements:
                part = wanted
            else:
                part = whole
            needed[name] = max(needed[name], min(part, whole))
    parameters = sorted(
        (inner for inner in body if inner.kind == "parameter"), key=lambda inner: inner.number
    )
    read = sum(
        size * needed[inner.name] / inner.elements if inner.elements else 0.0
        for inner, size in zip(parameters, sizes, strict=True)
    )
    return written + read
