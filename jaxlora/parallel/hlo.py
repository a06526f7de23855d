"""The text of a compiled program: its computations, how often each is run, and what its arrays take."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
# Not two of them: so ends a kernel's own text, which a custom call may quote over several lines.
_END = re.compile(r"^\}(?!\})")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_CONSTANT = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")
_ELEMENT = re.compile(r"= [su]\d+\[\]\S* get-tuple-element\(.*index=(\d+)")
_BODY = re.compile(r"\bbody=%?([\w.-]+)")
_NO_TRIPS = 1  # of a loop whose end depends on data


def computations(hlo: str) -> tuple[str, dict[str, list[str]]]:
    """The entry's name, and the instructions of each computation, a line each."""
    entry, name, bodies = "", None, {}
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif _END.match(line):
            name = None
        elif name is not None and INSTRUCTION.match(line):
            bodies[name].append(line)
    return entry, bodies


def runs(entry: str, bodies: Mapping[str, list[str]]) -> dict[str, tuple[int, int]]:
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

    def counted(name: str) -> tuple[int, int]:
        if name not in known:
            around = [(counted(caller), times) for caller, times in callers[name]]
            known[name] = (
                sum(count * (times or 1) for (count, _), times in around),
                max((depth + bool(times) for (_, depth), times in around), default=0),
            )
        return known[name]

    return {name: counted(name) for name in bodies}


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
    by_name = {match[1]: match[2] for inner in body if (match := INSTRUCTION.match(inner))}
    grown = re.search(r" add\(([^)]*)\)", by_name.get(handed_on[index], ""))
    for name in re.findall(r"%([\w.-]+)", grown[1]) if grown else ():
        if step := _CONSTANT.search(f"= {by_name.get(name, '')}"):
            return max(1, int(step[1]))
    return 1


def shape_of(text: str) -> tuple[int, ...]:
    """Of an `ARRAY`'s second part: "4,8" is (4, 8)."""
    return tuple(map(int, text.split(","))) if text else ()


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Of an `ARRAY` of that type, as XLA spells it, and shape."""
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.ceil(math.prod(shape) * bits / 8)
